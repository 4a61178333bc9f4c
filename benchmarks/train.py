"""Time the optimizer steps of one job with Lorikit's engine: LoRA r 8 on all seven linears of a saved model.

    python benchmarks/train.py --model FOLDER --rows ids.json          rows: [[input_ids, prompt_length], ...]
    python benchmarks/train.py --model FOLDER --long 4096 --batch 4    random rows, the second half labelled

Prints one line of JSON: ms a step (median), real tokens/s, peak memory, loss and gradient norm. Fails when the loss is
not finite or the gradient is zero.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from lorikit.config import load_config
from lorikit.data.values import IGNORE, Example
from lorikit.hub import Resolved
from lorikit.model.decoder import DecoderEngine
from lorikit.model.engine import Engine
from lorikit.model.load import load_engine
from lorikit.train.adamw import make_optimizer
from lorikit.train.metrics import peak_memory
from lorikit.train.optim import Budget, InFlight, begin_step, derived_seed, prepare_step, take_step

WARM_UP = 2  # steps that find their kernels; they count in all_steps_seconds only


def main() -> None:
    arguments = parse()
    begun = time.perf_counter()
    config = load_config(
        model={
            "name_or_path": str(arguments.model),
            "dtype": arguments.dtype,
            "engine": arguments.engine,
            "gpu_memory_gib": arguments.memory,
            "quantization": arguments.quantization,
        },
        data={"train": "none"},
        lora={"r": 8, "lora_alpha": 32, "lora_dropout": arguments.dropout},
        train={"output_dir": "none", "gradient_checkpointing": arguments.checkpointing, "seed": 0},
    )
    base = Resolved(arguments.model, "benchmark", "path", None)
    engine = load_engine(
        config.model, base, new_adapter=config.lora, gradient_checkpointing=arguments.checkpointing, seed=0
    )
    loaded = time.perf_counter() - begun
    optimizer = make_optimizer(engine, config.train)
    budget = Budget(arguments.max_tokens or engine.best_tokens(), print)
    rows = make_rows(arguments, arguments.batch * (arguments.steps + WARM_UP))
    engine.train()
    seconds, tokens = [], []
    count = arguments.steps + WARM_UP

    def begin(step: int) -> InFlight:
        examples = rows[step * arguments.batch : (step + 1) * arguments.batch]
        prepared = prepare_step(engine, examples, budget)
        seed = derived_seed(0, "dropout", step)
        return begin_step(engine, optimizer, prepared, budget, dropout_seed=seed, learning_rate=1e-4)

    # One step ahead, as the loop of `lorikit train`; nothing is in flight when the clock starts.
    started, ahead = time.perf_counter(), None
    for step in range(count):
        in_flight = ahead or begin(step)
        more = optimizer.runs_behind() and step + 1 not in (WARM_UP, count)
        ahead = begin(step + 1) if more else None
        done = in_flight.result()
        seconds.append(time.perf_counter() - started)
        started += seconds[-1]
        tokens.append(done.num_tokens)
        assert math.isfinite(done.loss_sum), "the loss is not finite"
        assert done.norm > 0, "there is no gradient: the figure would be worthless"
    step_seconds = median(seconds[WARM_UP:])
    result = {
        "who": f"Lorikit, engine {engine.name}",
        "quantization": arguments.quantization,
        "job": f"rows of {arguments.long}" if arguments.long else "tutorial",
        "rows_per_step": arguments.batch,
        "checkpointing": arguments.checkpointing,
        "dropout": arguments.dropout,
        "ms_per_step": round(step_seconds * 1000, 1),
        "mean_ms_per_step": round(sum(seconds[WARM_UP:]) / arguments.steps * 1000, 1),
        "steps": arguments.steps,
        "all_steps_seconds": round(sum(seconds), 2),
        "tokens_per_second": round(sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:])),
        "peak_gib": round(peak_memory(engine.device) / 2**30, 2),
        "loss": round(done.loss_sum / done.num_targets, 4),
        "grad_norm": round(done.norm, 4),
        "load_seconds": round(loaded, 1),
        "first_step_seconds": round(seconds[0], 2),
        **captures(engine),
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else platform.processor(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    result |= {"command": shlex.join(sys.argv), "commit": arguments.commit, "python": platform.python_version()}
    print(json.dumps(result))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
    if arguments.profile:
        mean = sum(tokens) / len(tokens)
        step = min(range(len(tokens)), key=lambda k: abs(tokens[k] - mean))
        examples = rows[step * arguments.batch : (step + 1) * arguments.batch]
        with torch.profiler.profile() as profile:
            take_step(engine, optimizer, examples, budget, dropout_seed=1, learning_rate=1e-4)
        print(f"a step of {tokens[step]} tokens, a typical one, which took {seconds[step] * 1000:.1f} ms")
        print(profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=60))


def captures(engine: Engine) -> dict[str, float]:
    """How many CUDA graphs the steps needed, and what capturing them took."""
    graphs = engine._graphs if isinstance(engine, DecoderEngine) else None
    return {} if graphs is None else {"graphs": len(graphs), "capture_seconds": round(graphs.capture_seconds, 2)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="rows of an optimizer step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=0, help="tokens of one forward; 0 lets the memory decide")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--memory", type=float, help="most GPU memory, in GiB (engine decoder)")
    parser.add_argument("--out", type=Path, help="also append the line to this file")
    parser.add_argument("--commit", help="of the code, for the line")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--profile", action="store_true", help="also print what one step spends its time on")
    arguments = parser.parse_args()
    if bool(arguments.rows) == bool(arguments.long):
        parser.error("give either --rows FILE or --long TOKENS")
    return arguments


def make_rows(arguments: argparse.Namespace, count: int) -> list[Example]:
    rng = random.Random(0)
    if arguments.long:
        ids = [[rng.randrange(1000, 100000) for _ in range(arguments.long)] for _ in range(count)]
        pairs = [(row, arguments.long // 2) for row in ids]
    else:
        pairs = json.loads(arguments.rows.read_text())
        rng.shuffle(pairs)
        pairs = [pairs[k % len(pairs)] for k in range(count)]
    return [Example(ids, [IGNORE] * cut + ids[cut:], f"row:{k}") for k, (ids, cut) in enumerate(pairs)]


if __name__ == "__main__":
    main()
