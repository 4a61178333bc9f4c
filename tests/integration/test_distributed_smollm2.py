"""Real weights in real processes: two and three of them leave the adapter of one, with rows that do not come out even."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def train(folder, name, *more):
    settings = folder / "run.yaml"
    rows = [
        {
            "instruction": f"Name number {n}",
            "input": "",
            "output": " ".join(["one", "two", "three", "four"][: n % 4 + 1]),
        }
        for n in range(11)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    settings.write_text(
        "model: {name_or_path: smollm2-135m-instruct, dtype: float32}\n"
        f"data: {{train: {folder / 'rows.json'}, max_length: 64}}\n"
        "lora: {r: 4, lora_dropout: 0, target_modules: [q_proj, v_proj]}\n"
        # the last step has one row: all ranks but one get none
        f"train: {{output_dir: {folder / name}, per_device_train_batch_size: 8, gradient_accumulation_steps: 1,\n"
        "  max_steps: 2, logging_steps: 1}\neval: {eval_size: 2}\n"
    )
    command = [sys.executable, "-m", "lorikit", "train", str(settings), "--no-compare", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / name / "adapter" / "adapter_model.safetensors"), lines


def test_two_and_three_processes_give_the_adapter_of_one(tmp_path):
    alone, curve = train(tmp_path, "one")
    for count in ("2", "3"):
        adapter, lines = train(tmp_path, count, "--gpus", count)
        assert adapter.keys() == alone.keys()
        assert max(float((adapter[name] - alone[name]).abs().max()) for name in alone) < 1e-5
        assert max(float(value.abs().max()) for value in adapter.values()) > 1e-4
        for one, other in zip(curve, lines, strict=True):
            for name in ("loss", "eval_loss", "grad_norm"):
                assert one.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-5)
            assert one.get("tokens") == other.get("tokens")
