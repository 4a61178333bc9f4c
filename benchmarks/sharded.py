"""Memory of a sharded base on 1 to N processes of a CPU: peak resident set of each, and what of the base it holds.

    python benchmarks/sharded.py --out benchmarks/results/sharded_cpu.json

Writes a Llama of random weights (0.6 GiB in float32 by default), then trains a few steps on it: one process that loads it
whole, and 1, 2 and 4 processes under torchrun with model.device_map shard. Fails unless all leave the adapter of the first, no
process ever held much more than its share and the layers in use, and the peak falls with the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorikit.config import load_config
from lorikit.data.values import Example
from lorikit.hub import Resolved
from lorikit.model import sharded
from lorikit.model.load import load_engine
from lorikit.train.adamw import make_optimizer
from lorikit.train.distributed import AgreedSignals
from lorikit.train.join import join
from lorikit.train.metrics import peak_memory
from lorikit.train.optim import Budget, Shared, begin_step, prepare_part
from lorikit.train.signals import Signals

LEARNING_RATE = 1e-4


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return
    if arguments.base:
        write_base(arguments.base, arguments.layers, arguments.width)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--base",
            str(base),
        ]  # a process that counts for nobody
        subprocess.run([*command, f"--layers={arguments.layers}", f"--width={arguments.width}"], check=True)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        results = [start(arguments, base, folder, count) for count in (0, 1, 2, 4)]
        own = load_file(folder / "0.safetensors")
        for result in results[1:]:
            other = load_file(folder / f"{result['processes']}.safetensors")
            result["largest_difference"] = max(float((own[name] - other[name]).abs().max()) for name in own)
    peaks = [max(result["peak_bytes"]) for result in results]
    report = {
        "what": "peak resident set of each process: a base loaded whole (processes 0) and sharded",
        "base_bytes": size,
        "layer_bytes": size // arguments.layers,
        "runs": results,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {version('torch')} on the CPU, gloo",
        "command": shlex.join(["python", "benchmarks/sharded.py", *sys.argv[1:]]),
    }
    print(json.dumps(report, indent=1))
    for result in results[
        1:
    ]:  # AdamW's first steps are of the size of the learning rate, also where the gradient is rounding
        assert result["largest_difference"] < 0.2 * LEARNING_RATE, "another adapter than of one process"
        assert abs(result["loss"] / results[0]["loss"] - 1) < 1e-6, "another loss than of one process"
    assert peaks[1] > peaks[2] > peaks[3], "the peak does not fall with the number of processes"
    for result in results[1:]:
        share = size / result["processes"]
        assert max(result["held_bytes"]) < 1.02 * share, "a process holds more than its share"
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def start(arguments: argparse.Namespace, base: Path, folder: Path, count: int) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count else []
    own = [str(Path(__file__).resolve()), "--worker", str(folder / str(count)), "--base", str(base)]
    own += ["--steps", str(arguments.steps)]
    subprocess.run([sys.executable, *torchrun, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((folder / f"{count}.json").read_text())


def work(arguments: argparse.Namespace) -> None:
    with Signals() as signals, join(signals) as ranks:
        begun = time.perf_counter()
        empty = peak_memory(torch.device("cpu"))
        config = load_config(
            model={
                "name_or_path": str(arguments.base),
                "device_map": "shard" if ranks.active else None,
                "engine": "generic",
            },
            data={"train": "none"},
            lora={"r": 8, "lora_dropout": 0.0},
            train={"output_dir": "none"},
        )
        engine = load_engine(config.model, Resolved(arguments.base, "random", "path", None), new_adapter=config.lora)
        loaded, seconds = peak_memory(engine.device), time.perf_counter() - begun
        optimizer, agreed = make_optimizer(engine, config.train), AgreedSignals(signals, ranks)
        budget = Budget(512, print, fixed=engine.sharded)
        engine.train()
        times = []
        for step in range(arguments.steps):
            begun = time.perf_counter()
            ids = [[(97 * step + 31 * row + 7 * k) % 4000 for k in range(16 + row)] for row in range(8)]
            rows = [Example(row, row, f"row:{k}") for k, row in enumerate(ids)]
            prepared = prepare_part(engine, ranks, rows, budget)
            shared = Shared(ranks, agreed, rows) if ranks.active else None
            done = begin_step(
                engine, optimizer, prepared, budget, dropout_seed=0, learning_rate=LEARNING_RATE, shared=shared
            )
            loss = done.result()
            times.append(time.perf_counter() - begun)
        told = ranks.numbers(empty, loaded, peak_memory(engine.device), sharded.held_bytes(engine.model))
        if ranks.first:
            names = ("empty_bytes", "loaded_bytes", "peak_bytes", "held_bytes")
            columns = {name: [int(row[k]) for row in told] for k, name in enumerate(names)}
            result = {"processes": ranks.size if ranks.active else 0, **columns, "load_seconds": round(seconds, 2)}
            result |= {"step_seconds": round(min(times), 3), "loss": loss.loss_sum / loss.num_targets}
            save_file(engine.adapter_state(), f"{arguments.worker}.safetensors")
            Path(f"{arguments.worker}.json").write_text(json.dumps(result))


def write_base(folder: Path, layers: int, width: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the report there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
