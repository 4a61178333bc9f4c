"""Time one job alone and under torchrun, on 1 to N processes: the same bytes, tokens/s, memory, what the network takes.

    python benchmarks/distributed.py --model FOLDER --rows ids.json --gpus 1 2 4 8      rows: [[input_ids, prompt_length], ...]
    python benchmarks/distributed.py --model FOLDER --long 4096 --batch 16 --gpus 1 2 4 8

The job is that of benchmarks/train.py: LoRA r 8 on all seven linears. Each count of processes trains the same steps on the
same rows; count 0 is one process without torchrun. Without a GPU the processes are of the CPU, connected by gloo. Prints one
line of JSON for each count, then what follows from them; fails where one process under torchrun leaves other bytes than
alone, or where N processes leave another adapter than one by more than rounding (with --dropout 0; masks differ by rank).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file
from train import make_rows  # the rows of benchmarks/train.py, which stands beside this file

from lorikit.config import load_config
from lorikit.hub import Resolved
from lorikit.model.load import load_engine
from lorikit.train.adamw import make_optimizer
from lorikit.train.distributed import AgreedSignals, Ranks, add_gradients, lengths_of
from lorikit.train.join import join
from lorikit.train.metrics import peak_memory
from lorikit.train.network import links_of
from lorikit.train.optim import Budget, InFlight, Shared, begin_step, derived_seed, prepare_step
from lorikit.train.plan_costs import Target
from lorikit.train.signals import Signals

WARM_UP = 4  # steps that compile kernels and capture graphs, before the clock


def main() -> None:
    arguments = parse()
    if arguments.worker is not None:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = [start(arguments, count, Path(folder)) for count in [0, *arguments.gpus]]
        for result in results:
            print(json.dumps(result))
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
        judge(arguments, results, Path(folder))


def start(arguments: argparse.Namespace, count: int, folder: Path) -> dict[str, object]:
    """One run of `count` processes under torchrun; without it for 0."""
    own = [str(Path(__file__).resolve()), *sys.argv[1:], "--worker", str(folder / f"{count}")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count else []
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(arguments.threads or max(1, cores // max(1, count)))}
    subprocess.run([sys.executable, *torchrun, *own], check=True, env=os.environ | threads)
    result: dict[str, object] = json.loads((folder / f"{count}.json").read_text())
    return result


def work(arguments: argparse.Namespace) -> None:
    """One process of a run; rank 0 leaves the result and the adapter in files beside `arguments.worker`."""
    with Signals() as signals, join(signals) as ranks:
        config = load_config(
            model={"name_or_path": str(arguments.model), "dtype": arguments.dtype, "engine": arguments.engine},
            data={"train": "none"},
            lora={"r": 8, "lora_alpha": 32, "lora_dropout": arguments.dropout},
            train={"output_dir": "none", "seed": 0},
        )
        engine = load_engine(
            config.model, Resolved(arguments.model, "benchmark", "path", None), new_adapter=config.lora
        )
        optimizer, agreed = make_optimizer(engine, config.train), AgreedSignals(signals, ranks)
        budget = Budget(arguments.max_tokens or engine.best_tokens(), print)
        count = arguments.steps + WARM_UP
        rows = make_rows(arguments, arguments.batch * count)
        steps = [rows[at : at + arguments.batch] for at in range(0, len(rows), arguments.batch)]
        shares = [ranks.share(step, lengths_of(step)) for step in steps]

        def begin(step: int) -> InFlight:
            shared = Shared(ranks, agreed, steps[step]) if ranks.active else None
            purpose = f"dropout of rank {ranks.rank}" if ranks.rank else "dropout"
            prepared = prepare_step(engine, shares[step], budget)
            seed = derived_seed(0, purpose, step)
            return begin_step(engine, optimizer, prepared, budget, dropout_seed=seed, learning_rate=1e-4, shared=shared)

        engine.train()
        seconds, started, ahead = [], time.perf_counter(), None
        for step in range(count):
            in_flight = ahead or begin(step)
            more = optimizer.runs_behind() and step + 1 not in (WARM_UP, count)
            ahead = begin(step + 1) if more else None
            done = in_flight.result()
            seconds.append(time.perf_counter() - started)
            started += seconds[-1]
            assert math.isfinite(done.loss_sum) and done.norm > 0, "no finite loss, or no gradient"
        peaks = [peak for (peak,) in ranks.numbers(float(peak_memory(engine.device)))]
        exchange = time_exchange(ranks, engine)
        if not ranks.first:
            return
        timed = seconds[WARM_UP:]
        tokens = [sum(lengths_of(step)) for step in steps[WARM_UP:]]
        loads = [max(sum(lengths_of(s)) for s in (ranks_share(step, ranks.size))) for step in steps[WARM_UP:]]
        state = engine.adapter_state()
        save_file(state, f"{arguments.worker}.safetensors")
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()
        gpu = engine.device.type == "cuda"
        result = {
            "processes": ranks.size,
            "torchrun": ranks.active,
            "backend": ("nccl" if gpu else "gloo") if ranks.active else None,
            "engine": engine.name,
            "job": f"rows of {arguments.long}" if arguments.long else "tutorial",
            "rows_per_step": arguments.batch,
            "dropout": arguments.dropout,
            "steps": arguments.steps,
            "ms_per_step": round(median(timed) * 1000, 2),
            "mean_ms_per_step": round(sum(timed) / len(timed) * 1000, 2),
            "tokens_per_second": round(sum(tokens) / sum(timed)),
            "largest_share": round(sum(loads) / sum(tokens), 4),
            "peak_gib": [round(peak / 2**30, 2) for peak in peaks],
            "exchange_bytes": 4 * sum(p.numel() for p in engine.parameters()),
            "exchange_ms": exchange,
            "predicted_exchange_ms": predicted_exchange(ranks, engine),
            "loss": done.loss_sum / done.num_targets,
            "adapter_sha256": digest,
            "first_steps_seconds": round(sum(seconds[:WARM_UP]), 2),
            "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "command": shlex.join(sys.argv[: sys.argv.index("--worker")]),
            "commit": arguments.commit,
        }
        Path(f"{arguments.worker}.json").write_text(json.dumps(result))


def ranks_share(rows: list, size: int) -> list[list]:
    return [Ranks(rank=rank, size=size).share(rows, lengths_of(rows)) for rank in range(size)]


def time_exchange(ranks: Ranks, engine) -> float | None:
    """Milliseconds of one sum of the flat gradient over the ranks, by itself: the least of ten."""
    if not ranks.active:
        return None

    def settle() -> float:
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    best = math.inf
    for _ in range(10):
        ranks.wait()
        begun = settle()
        add_gradients(ranks, engine, spoilt=False)
        best = min(best, settle() - begun)
    return round(best * 1000, 3)


def predicted_exchange(ranks: Ranks, engine) -> float:
    """What `lorikit plan` thinks that sum takes, on one machine."""
    gpu = engine.device.type == "cuda"
    name = torch.cuda.get_device_name() if gpu else "CPU"
    links = links_of(Target("cuda" if gpu else "cpu", name, None, None, torch.float32), ranks.size, 1)
    return round(links.sum_seconds(4 * sum(p.numel() for p in engine.parameters())) * 1000, 3)


def judge(arguments: argparse.Namespace, results: list[dict], folder: Path) -> None:
    """What follows: is torchrun free, are the adapters the same, how much of N processes arrives."""
    alone = results[0]
    for result in results[1:]:
        count = result["processes"]
        own, other = (load_file(folder / f"{n}.safetensors") for n in (0, count))
        difference = max(float((own[name] - other[name]).abs().max()) for name in own)
        speed = result["tokens_per_second"] / alone["tokens_per_second"]
        print(
            f"{count} under torchrun: {speed:.3f} x the tokens/s of one process alone, efficiency {speed / count:.1%} "
            f"(the largest share of a step allows {1 / (count * result['largest_share']):.1%}), "
            f"the sum takes {result['exchange_ms']} ms of {result['ms_per_step']} (lorikit plan: "
            f"{result['predicted_exchange_ms']}); the adapter differs by {difference:.2e}"
        )
        if count == 1:
            assert result["adapter_sha256"] == alone["adapter_sha256"], (
                "one process under torchrun left other bytes than alone"
            )
            slower = result["ms_per_step"] / alone["ms_per_step"] - 1
            print(f"1 under torchrun: the same bytes; {slower:+.2%} time a step (bound: +2 %)")
            assert slower < 0.02 or not arguments.strict, "torchrun costs 2 % or more"
        elif arguments.dropout == 0 and arguments.dtype == "float32":
            assert difference < 1e-5, "not the adapter of one process"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="rows of an optimizer step, of all processes together")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1], help="how many processes, one count after the other"
    )
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--max-tokens", type=int, default=0, help="tokens of one forward; 0 lets the memory decide")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0 shares the cores out")
    parser.add_argument("--strict", action="store_true", help="fail where torchrun costs 2 %% of the time or more")
    parser.add_argument("--out", type=Path, help="also append the lines to this file")
    parser.add_argument("--commit", help="of the code, for the lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if bool(arguments.rows) == bool(arguments.long):
        parser.error("give either --rows FILE or --long TOKENS")
    return arguments


if __name__ == "__main__":
    main()
