"""A base sharded over processes: the rows that each one reads, and the adapter of one process that holds it whole."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorikit.config import load_config
from lorikit.errors import ConfigError, ModelError
from lorikit.hub import Resolved
from lorikit.model import sharded
from lorikit.model.load import load_engine
from test_distributed import command, environment, same


@given(st.integers(1, 200), st.integers(1, 17))
def test_the_shares_of_rows_are_those_of_torch_chunk(count, size):
    ranges = [sharded.rows_of(count, rank, size) for rank in range(size)]
    cut = [chunk.tolist() for chunk in torch.arange(count).chunk(size)]
    assert [list(range(*share)) for share in ranges] == cut + [[]] * (size - len(cut))


@given(
    st.integers(1, 9), st.sampled_from([(), (3,), (2, 2)]), st.sampled_from([torch.float32, torch.bfloat16]), st.data()
)
def test_rows_are_read_as_safetensors_reads_them(count, rest, dtype, data):
    first = data.draw(st.integers(0, count))
    end = data.draw(st.integers(first, count))
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        tensors = {"a": torch.randn(5, dtype=dtype), "b": torch.randn(count, *rest, dtype=dtype)}
        save_file(tensors, Path(name) / "model.safetensors", metadata={"format": "pt"})
        stored = sharded._stored(Path(name))
        assert stored.keys() == tensors.keys() and stored["b"].shape == (count, *rest)
        assert torch.equal(stored["b"].read(first, end), tensors["b"][first:end])


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (9).to_bytes(8, "little") + b"not json{"])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors: damaged"):
        sharded._stored(tmp_path)


def test_without_other_processes_the_setting_says_how_to_start_them(tmp_path):
    config = load_config(
        model={"name_or_path": "m", "device_map": "shard"}, data={"train": "d"}, train={"output_dir": "r"}
    )
    with pytest.raises(ConfigError, match="lorikit train --gpus N"):
        load_engine(config.model, Resolved(tmp_path, "m", "path", None), new_adapter=config.lora)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on the generic engine by one process; its folder and its command."""
    folder = tmp_path_factory.mktemp("whole")
    given = command(folder, "--lora.lora_dropout", "0", "--model.engine", "generic")
    done = subprocess.run(given, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, given


@pytest.mark.parametrize("device_map", ["shard", "shard-offload"])
def test_two_processes_with_half_a_base_each_give_the_adapter_of_one(device_map, whole, tmp_path):
    folder, given = whole
    # Few tokens a forward: the two need different numbers of them, which the one with fewer makes up.
    more = ["--gpus", "2", "--model.device_map", device_map, "--train.max_tokens_per_forward", "150"]
    run = [*given, *more, "--train.output_dir", str(tmp_path / "run")]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert same(folder / "run", tmp_path / "run", 1e-5)
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (folder / "run", tmp_path / "run")
    ]
    for one, other in zip(*lines, strict=True):
        assert one.get("answers") == other.get("answers")
        for name in ("loss", "eval_loss"):
            assert one.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-5)
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tuple(value.shape) for name, value in state.items() if "up_proj.lora_B" in name} == {(64, 8)}, "saved whole"
    ask = [sys.executable, "-m", "lorikit", "generate", str(tmp_path / "run"), "--prompt", "what is 3", "--greedy"]
    told = subprocess.run(
        [*ask, "--max-new-tokens", "3", "--device", "cpu"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
