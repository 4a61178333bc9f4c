"""What a quantised base costs: the demo's held-out loss with `model.quantization` beside that of the base as it is.

    python benchmarks/quantized_loss.py [--kinds fp8 nf4] [--seeds 1 2 3] [--threads 2] [--work DIR] [--out FILE]

`lorikit train examples/demo.yaml` as a user calls it, a fifth of the rows held out, the same seed (so the same rows, order and
first adapter) with `none` and with each kind. The held-out loss is taken after each epoch and after the last step; `share` is
that of a kind over that of `none` of the same seed, less 1. One seed is a sample: AdamW at the demo's rate turns small
differences into others, so that the mean over seeds is what counts, with its standard error.

Prints a table and writes JSON. With --work, finished runs found there are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantized_loss.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["fp8", "nf4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32", help="model.dtype of all runs")
    parser.add_argument("--work", type=Path, help="where runs are kept; by default a folder that goes at the end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        curves = {
            kind: {seed: trained(work / f"{kind}-{seed}", kind, seed, arguments) for seed in arguments.seeds}
            for kind in ["none", *arguments.kinds]
        }
    kinds = {kind: compared(curves["none"], curves[kind]) for kind in arguments.kinds}
    result = {
        "command": " ".join(["python benchmarks/quantized_loss.py", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": arguments.threads},
        "versions": {name: version(name) for name in ("lorikit", "torch")},
        "held_out_loss": curves,
        "share": kinds,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'':6}{'after step':>11}{'none':>9}{'kind':>9}{'share':>9}{'± s.e.':>9}")
    for kind, rows in kinds.items():
        for row in rows:
            print(
                f"{kind:6}{row['step']:>11}{row['none']:>9.4f}{row['loss']:>9.4f}{row['share']:>+9.2%}{row['error']:>9.2%}"
            )


def trained(run: Path, kind: str, seed: int, arguments: argparse.Namespace) -> dict[int, float]:
    """Held-out loss by step of one run, which is trained unless it is finished."""
    command = [sys.executable, "-m", "lorikit", "train", "examples/demo.yaml", "--no-compare", "--json"]
    command += ["--model.quantization", kind, "--model.dtype", arguments.dtype, "--model.device", "cpu"]
    command += ["--train.seed", str(seed), "--train.output_dir", str(run), "--eval.eval_size", "0.2"]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def compared(plain: dict[int, dict[int, float]], other: dict[int, dict[int, float]]) -> list[dict[str, Any]]:
    """For each evaluated step the mean losses, and mean and standard error of the share over the seeds."""
    rows = []
    for step in next(iter(plain.values())):
        shares = [other[seed][step] / plain[seed][step] - 1 for seed in plain]
        error = stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
        rows.append(
            {
                "step": step,
                "none": mean(plain[seed][step] for seed in plain),
                "loss": mean(other[seed][step] for seed in plain),
                "share": mean(shares),
                "error": error,
                "shares": shares,
            }
        )
    return rows


if __name__ == "__main__":
    main()
