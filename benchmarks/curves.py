"""Train one model with both engines from the same adapter on the same rows, and compare the curves of their losses.

    python benchmarks/curves.py --model FOLDER [--rows examples/persona.json] [--steps 200] [--device cuda]

`generic` is transformers + peft. Without dropout, in float32, the two must be alike: prints the largest difference of a
step's loss in parts of the first loss. With dropout 0.1, in the model's own type, the masks differ: prints the mean loss of
the last steps for one seed of `generic` and several of `decoder`. One line of JSON a comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorikit.config import load_config
from lorikit.data.audit import prepare
from lorikit.data.encode import Encoder
from lorikit.data.values import Example
from lorikit.hub import resolve_model
from lorikit.model.load import load_engine, load_tokenizer, stop_ids
from lorikit.train.adamw import make_optimizer
from lorikit.train.optim import Budget, derived_seed, plan_steps, take_step

LAST = 20  # steps whose mean is the end of a curve


def main() -> None:
    arguments = parse()
    base = resolve_model(str(arguments.model))
    config = settings(arguments, "generic", 0.0, "float32", seed=0)
    encoder = Encoder(load_tokenizer(base.path), config.data, stop_ids(base.path))
    rows = prepare([arguments.rows], None, config, encoder).train
    about = {
        "model": arguments.model.name,
        "rows": len(rows),
        "steps": arguments.steps,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "command": shlex.join(sys.argv),
        "commit": arguments.commit,
    }
    exact = {engine: curve(arguments, base, rows, engine, 0.0, "float32", 0) for engine in ("generic", "decoder")}
    both = list(zip(exact["generic"], exact["decoder"], strict=True))
    result: dict[str, Any] = {
        "dropout": 0.0,
        "dtype": "float32",
        "largest_difference": max(abs(a - b) for a, b in both) / both[0][0],
        "losses": {name: thin(values) for name, values in exact.items()},
    }
    write(arguments, result | about)
    runs = [("generic", 0), *(("decoder", seed) for seed in range(arguments.seeds))]
    dropped = {
        f"{engine}, seed {seed}": curve(arguments, base, rows, engine, 0.1, "auto", seed) for engine, seed in runs
    }
    result = {
        "dropout": 0.1,
        "dtype": "auto",
        "mean_of_last": {name: round(sum(values[-LAST:]) / LAST, 4) for name, values in dropped.items()},
        "losses": {name: thin(values) for name, values in dropped.items()},
    }
    write(arguments, result | about)


def settings(arguments: argparse.Namespace, engine: str, dropout: float, dtype: str, seed: int) -> Any:
    return load_config(
        model={"name_or_path": str(arguments.model), "engine": engine, "dtype": dtype, "device": arguments.device},
        data={"train": str(arguments.rows), "max_length": 256},
        lora={"r": 8, "lora_alpha": 32, "lora_dropout": dropout},
        train={
            "output_dir": "none",
            "max_steps": arguments.steps,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-4,
            "seed": seed,
        },
        eval={"eval_size": 0},
    )


def curve(
    arguments: argparse.Namespace, base: Any, rows: list[Example], name: str, dropout: float, dtype: str, seed: int
) -> list[float]:
    """The mean loss of each step; the rows of a step depend on nothing but its number."""
    config = settings(arguments, name, dropout, dtype, seed)
    engine = load_engine(config.model, base, new_adapter=config.lora, seed=0)
    optimizer, budget = make_optimizer(engine, config.train), Budget(engine.best_tokens(), print)
    plan = plan_steps(settings(arguments, name, 0.0, dtype, 0).train, len(rows))
    engine.train()
    losses = []
    for step in range(plan.num_steps):
        examples = [rows[row] for row in plan.rows(step)]
        done = take_step(
            engine,
            optimizer,
            examples,
            budget,
            dropout_seed=derived_seed(seed, "dropout", step),
            learning_rate=plan.learning_rate(step),
        )
        assert math.isfinite(done.loss_sum), "the loss is not finite"
        assert done.norm > 0, "there is no gradient"
        losses.append(done.loss_sum / done.num_targets)
    print(f"{name}, dropout {dropout}, {dtype}, seed {seed}: {losses[0]:.4f} to {losses[-1]:.4f}", file=sys.stderr)
    return losses


def thin(values: list[float]) -> dict[int, float]:
    """Some points of a curve, by step."""
    return {
        step + 1: round(values[step], 5) for step in sorted({0, 1, 9, 49, 99, len(values) - 1}) if step < len(values)
    }


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    print(json.dumps(result))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path("examples/persona.json"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="runs of the decoder with dropout")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--commit", help="of the code, for the lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
