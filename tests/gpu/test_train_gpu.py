"""The loop on a GPU: the same bytes after a resume, and a step that does not fit is taken in halves."""

import gc
import io
import os
import signal

import pytest
import torch
from rich.console import Console

from lorikit.config import LoraSettings, ModelConfig, RunConfig
from lorikit.data.pack import pack
from lorikit.data.values import Example
from lorikit.errors import Interrupted, OutOfMemoryError
from lorikit.hub import Resolved
from lorikit.model.host import host_copies
from lorikit.model.load import load_engine
from lorikit.train.metrics import peak_memory
from lorikit.train.progress import Report
from lorikit.train.signals import Signals
from lorikit.train.training import Training
from tiny_model import save_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("base") / "model", longest=4096)
    return Resolved(path=folder, name="tiny", hub="path", revision=None)


def rows(number, length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 256, (number, length), generator=generator).tolist()
    return [Example(row, row, f"rows.json:{index}") for index, row in enumerate(ids)]


def training(base, run, examples, signals=None, **train):
    run.mkdir(exist_ok=True)
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": "tiny", "device": "cuda:0"},
            "data": {"train": "rows.json"},
            "train": {"output_dir": str(run), "num_train_epochs": 2, "save_steps": 3, "learning_rate": 1e-3, **train},
        }
    )
    engine = load_engine(
        ModelConfig(name_or_path="tiny", device="cuda:0"), base, new_adapter=LoraSettings(lora_dropout=0.1), seed=1
    )
    report = Report(Console(file=io.StringIO(), width=300))
    made = Training(config, run, engine, examples[2:], held_out=examples[:2], report=report, signals=signals)
    made.restore()
    return made


def test_a_run_that_was_stopped_on_a_gpu_resumes_to_the_same_bytes(base, tmp_path):
    examples = rows(70, 120)
    training(base, tmp_path / "whole", examples).run()
    for step in (2, 5, 8):
        with Signals() as signals:
            cut = training(base, tmp_path / "cut", examples, signals)
            prepare = cut.engine.prepare

            def stop_at(batch, cut=cut, prepare=prepare, step=step, signals=signals):
                if cut.state.step + 1 >= step and not signals.received:
                    os.kill(os.getpid(), signal.SIGTERM)
                return prepare(batch)

            cut.engine.prepare = stop_at
            # The loop prepares one step ahead where nothing is due: what it is at when the signal comes is still taken.
            with pytest.raises(Interrupted, match=f"after step ({step}|{step + 1});"):
                cut.run()
    training(base, tmp_path / "cut", examples).run()
    whole, cut = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_step_that_does_not_fit_the_gpu_is_halved_and_a_row_that_does_not_fit_is_named(base, tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    # Large enough for the 32 MiB that cuBLAS takes for each stream not to matter.
    made = training(base, tmp_path / "run", rows(34, 4096), max_tokens_per_forward=32 * 4096)
    for _ in range(2):  # the first call also sets up libraries
        torch.cuda.reset_peak_memory_stats(0)
        before = torch.cuda.memory_allocated(0)
        made.engine.clear_gradient()
        made.engine.add_gradient(pack(rows(16, 4096)))
    needed = torch.cuda.max_memory_allocated(0) - before
    assert needed > 2**27
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + needed * 0.75) / total, 0)
    try:
        made.run()
        assert "out of memory at" in made.report.console.file.getvalue()
        assert 4096 <= made.budget.max_tokens < 32 * 4096
        del made
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 2**23) / total, 0)
        with pytest.raises(OutOfMemoryError, match=r"rows.json:\d+: one row of 4000 tokens does not fit"):
            training(base, tmp_path / "long", rows(6, 4000)).run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_a_copy_on_the_host_is_complete_and_of_its_time():
    flat = torch.randn(2**24, device="cuda:0")
    parameters = [flat[:100].view(10, 10), flat[100 : 100 + 2**23].view(2**10, 2**13)]
    want = [parameter.cpu() for parameter in parameters]
    copies = host_copies(flat, parameters)
    flat.zero_()
    assert all(torch.equal(copy, value) for copy, value in zip(copies, want, strict=True))
    assert all(copy.is_pinned() for copy in copies)


def test_peak_memory_is_that_of_the_gpu():
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    block = torch.ones(2**26, device="cuda:0")
    assert peak_memory(torch.device("cuda:0")) >= before + block.numel() * 4
