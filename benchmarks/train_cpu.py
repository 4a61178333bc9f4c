"""The demo's job with Lorikit and with the tutorial's own code (Trainer + PEFT), side by side on this machine's CPU.

    python benchmarks/train_cpu.py [--steps 8 --rounds 3] [--threads 1]

Both get the same token ids and labels, the same rows in the same steps, and the same initial adapter; each measurement is
a process of its own, and they take turns. Speed and memory are measured with the tutorial's dropout. Loss and gradient
norm are compared without dropout, since no two programs draw the same masks. tokens/s counts real tokens, not padding,
from the end of the first step to the end of the last, by the clock and by the seconds of processor time that the process
took; with --threads 1 the latter says the same on a busy machine. Memory is the process's largest resident set.

Prints a table, writes benchmarks/results/train_cpu.json, and fails when a loss is not finite, a gradient is zero, or the
curves differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "train_cpu.json"
DROPOUT = 0.1  # the tutorial's
SPEEDS = ("tokens_per_second", "tokens_per_cpu_second")
SAME = 2e-3  # largest relative difference between two curves that only differ by the order of float32 sums

# name -> (program, settings that differ from the demo's)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tutorial": ("tutorial", {"gradient_checkpointing": True}),
    "Lorikit generic, checkpointing": ("lorikit", {"engine": "generic", "gradient_checkpointing": True}),
    "Lorikit decoder, checkpointing": ("lorikit", {"engine": "decoder", "gradient_checkpointing": True}),
    "tutorial without checkpointing": ("tutorial", {"gradient_checkpointing": False}),
    "Lorikit generic": ("lorikit", {"engine": "generic", "gradient_checkpointing": False}),
    "Lorikit decoder": ("lorikit", {"engine": "decoder", "gradient_checkpointing": False}),
}
# What is compared with what: the same recomputation on both sides.
PAIRS = [
    ("Lorikit generic, checkpointing", "tutorial"),
    ("Lorikit decoder, checkpointing", "tutorial"),
    ("Lorikit generic", "tutorial without checkpointing"),
    ("Lorikit decoder", "tutorial without checkpointing"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each variant; the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each measurement")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "demo.yaml")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, metavar=("WORK", "JOB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work, job = Path(arguments.child[0]), json.loads(arguments.child[1])
        result = CHILDREN[job["program"]](work, job)
        (work / "result.json").write_text(json.dumps(result))
        return
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # the children's
        job = {"steps": arguments.steps, "config": str(arguments.config)}
        data = in_own_process(work, {"program": "prepare", **job})
        speed: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for number in range(arguments.rounds):
            for name, (program, settings) in VARIANTS.items():
                result = in_own_process(work, {"program": program, "dropout": DROPOUT, **settings, **job})
                speed[name].append(result)
                shown = ", ".join(f"{result[key]:.1f} {key}" for key in SPEEDS)
                say(f"round {number + 1} {name}: {shown}, {gib(result)}")
        curves = {
            name: in_own_process(work, {"program": program, "dropout": 0.0, **settings, **job})
            for name, (program, settings) in VARIANTS.items()
        }
    asked = {name: getattr(arguments, name) for name in ("steps", "rounds", "threads")}
    report = summary(speed, curves, data) | asked
    report["machine"] = machine() | {"load_before": load_before}
    print(table(report))
    check(speed, curves)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    say(f"wrote {arguments.out}")


def in_own_process(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What one child measured. This process stays small: it imports no torch."""
    command = [sys.executable, __file__, "--child", str(work), json.dumps(job)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{job['program']} failed:\n{done.stderr[-4000:]}")
    return json.loads((work / "result.json").read_text())


def prepare(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Rows as token ids in the order of the steps, and the initial adapter, for both programs to start from."""
    from lorikit.data.audit import prepare as account
    from lorikit.data.encode import Encoder
    from lorikit.data.pack import num_targets
    from lorikit.hub import resolve_data, resolve_model
    from lorikit.model.load import load_engine, load_tokenizer, stop_ids
    from lorikit.model.lora import save_adapter
    from lorikit.train.optim import plan_steps

    config = settings_of(job)
    base = resolve_model(config.model.name_or_path, config.model.revision, config.model.hub)
    encoder = Encoder(load_tokenizer(base.path), config.data, stop_ids(base.path))
    names = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    rows = account([resolve_data(name).path for name in names], None, config, encoder).train
    size = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    rows = rows[: len(rows) // size * size]  # full steps only, so that the tutorial's loader deals out the same ones
    plan = plan_steps(config.train, len(rows))
    order = [list(plan.rows(step)) for step in range(job["steps"])]
    engine = load_engine(config.model, base, new_adapter=config.lora, seed=config.train.seed)
    (work / "initial").mkdir()
    save_adapter(work / "initial", engine, base_name=str(base.path), base_revision=None, card="")
    dumped = [[row.input_ids, row.labels, row.source] for row in rows]
    (work / "rows.json").write_text(json.dumps({"rows": dumped, "order": order, "base": str(base.path)}))
    used = [rows[i] for step in order for i in step]
    tokens = sum(len(row.input_ids) for row in used)
    micro = [used[i : i + config.train.per_device_train_batch_size] for i in range(0, len(used), 4)]
    padded = sum(len(m) * max(len(row.input_ids) for row in m) for m in micro)
    return {
        "model": base.name,
        "rows": len(rows),
        "tokens": tokens,
        "labelled_share": sum(map(num_targets, used)) / tokens,
        "padding_share": 1 - tokens / padded,
    }


def settings_of(job: dict[str, Any]) -> Any:
    """The demo's settings with the tutorial's batch and a measurement's own: nothing held out, a log line each step."""
    from lorikit.config import load_config

    train = {"max_steps": job["steps"], "logging_steps": 1, "save_steps": 10**6, "report_to": []}
    train |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "output_dir": "unused"}
    train |= {"gradient_checkpointing": job.get("gradient_checkpointing", False)}
    train |= {"lr_scheduler_type": "linear", "warmup_steps": 0, "warmup_ratio": 0.0, "weight_decay": 0.0}
    lora = {"lora_dropout": job.get("dropout", 0.0)}
    model = {"dtype": "float32", "device": "cpu", "engine": job.get("engine", "generic")}
    held_out = {"eval_size": 0, "data": None, "prompts": [], "early_stopping_patience": None}
    os.chdir(ROOT)  # the demo's paths are relative to the repository
    return load_config(job["config"], model=model, lora=lora, train=train, eval=held_out)


def lorikit(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Lorikit's own loop, its figures from the metrics.jsonl that it writes."""
    from rich.console import Console

    from lorikit.config import RunConfig
    from lorikit.data.values import Example
    from lorikit.hub import Resolved
    from lorikit.model.load import load_engine
    from lorikit.train.progress import Report
    from lorikit.train.training import Training

    data = json.loads((work / "rows.json").read_text())
    config: RunConfig = settings_of(job)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"init_adapter": str(work / "initial")})})
    base = Resolved(path=Path(data["base"]), name=data["base"], hub="path", revision=None)
    engine = load_engine(
        config.model,
        base,
        new_adapter=config.lora,
        seed=config.train.seed,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    rows = [Example(ids, labels, source) for ids, labels, source in data["rows"]]
    ends: list[tuple[float, float]] = []

    class Clock(Report):
        def step(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

    with tempfile.TemporaryDirectory(dir=work) as run, Path(os.devnull).open("w") as nowhere:
        Training(config, Path(run), engine, rows, report=Clock(Console(file=nowhere))).run()
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(ends) == job["steps"]
    return measured([line["loss"] for line in lines], [line["grad_norm"] for line in lines], ends, step_tokens(data))


def tutorial(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The tutorial's recipe: padded batches from DataCollatorForSeq2Seq, PEFT, transformers' Trainer."""
    import torch
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    data = json.loads((work / "rows.json").read_text())
    config = settings_of(job)
    tokenizer = AutoTokenizer.from_pretrained(data["base"])
    tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(data["base"], dtype=torch.float32)
    if job["gradient_checkpointing"]:
        base.enable_input_require_grads()
    model = PeftModel.from_pretrained(base, str(work / "initial"), is_trainable=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = job["dropout"]
    dealt = [data["rows"][i] for step in data["order"] for i in step]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels} for ids, labels, _ in dealt]

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

    arguments = TrainingArguments(
        output_dir=str(work / "tutorial"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=job["steps"],
        learning_rate=config.train.learning_rate,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=job["gradient_checkpointing"],
        train_sampling_strategy="sequential",  # the rows lie in the order of the steps
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()])
    trainer.train()
    logs = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(logs) == job["steps"]
    losses, norms = [line["loss"] for line in logs], [float(line["grad_norm"]) for line in logs]
    return measured(losses, norms, ends, step_tokens(data))


CHILDREN: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "prepare": prepare,
    "lorikit": lorikit,
    "tutorial": tutorial,
}


def now() -> tuple[float, float]:
    """The clock, and the processor time of all threads of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def step_tokens(data: dict[str, Any]) -> list[int]:
    return [sum(len(data["rows"][i][0]) for i in step) for step in data["order"]]


def measured(
    losses: list[float], norms: list[float], ends: list[tuple[float, float]], tokens: list[int]
) -> dict[str, Any]:
    """The first step warms up; memory is this process's high-water mark, in bytes."""
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    seconds, cpu_seconds = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    speed = {"tokens_per_second": sum(tokens[1:]) / seconds, "tokens_per_cpu_second": sum(tokens[1:]) / cpu_seconds}
    return speed | {"peak_bytes": peak, "losses": losses, "grad_norms": norms}


def summary(speed: dict[str, Any], curves: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, the ratio to the peer of the same kind, and the curves."""
    variants = {
        name: {
            **{key: median(run[key] for run in runs) for key in SPEEDS},
            "rounds": [{key: run[key] for key in (*SPEEDS, "peak_bytes")} for run in runs],
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "losses": curves[name]["losses"],
            "grad_norms": curves[name]["grad_norms"],
        }
        for name, runs in speed.items()
    }
    ratios = [
        {
            "ours": ours,
            "theirs": theirs,
            **{key: variants[ours][key] / variants[theirs][key] for key in SPEEDS},
            "memory": variants[ours]["peak_bytes"] / variants[theirs]["peak_bytes"],
            "largest_loss_difference": largest_difference(variants[ours]["losses"], variants[theirs]["losses"]),
        }
        for ours, theirs in PAIRS
    ]
    return {"data": data, "variants": variants, "ratios": ratios}


def check(speed: dict[str, Any], curves: dict[str, Any]) -> None:
    """A figure from a run that learned nothing, or something else, would be worthless."""
    for name, run in [*curves.items(), *((name, run) for name, runs in speed.items() for run in runs)]:
        assert all(map(math.isfinite, run["losses"])), f"{name}: a loss is not finite"
        assert all(0 < norm < math.inf for norm in run["grad_norms"]), f"{name}: a gradient is zero or not finite"
    theirs = curves["tutorial"]
    for name, run in curves.items():
        for key in ("losses", "grad_norms"):
            difference = largest_difference(run[key], theirs[key])
            assert difference < SAME, f"{name}: {key} differ from the tutorial's by {difference:.1e}"


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def table(report: dict[str, Any]) -> str:
    return "\n".join(rows_of_table(report))


def rows_of_table(report: dict[str, Any]) -> Iterator[str]:
    yield "| who | tokens/s | tokens/CPU second | peak memory | loss, first and last step |"
    yield "|---|---|---|---|---|"
    for name, figures in report["variants"].items():
        first, last = figures["losses"][0], figures["losses"][-1]
        speed = " | ".join(f"{figures[key]:.1f}" for key in SPEEDS)
        yield f"| {name} | {speed} | {gib(figures)} | {first:.4f} -> {last:.4f} |"
    for ratio in report["ratios"]:
        yield (
            f"\n{ratio['ours']} against {ratio['theirs']}: {ratio['tokens_per_second']:.2f} x the speed "
            f"({ratio['tokens_per_cpu_second']:.2f} x by processor time), {ratio['memory']:.2f} x the memory, "
            f"losses equal to {ratio['largest_loss_difference']:.0e}"
        )


def gib(figures: dict[str, Any]) -> str:
    return f"{figures['peak_bytes'] / 2**30:.2f} GiB"


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=False).stdout
    packages = ["torch", "transformers", "peft", "accelerate"]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": commit + (" with changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/train_cpu.py " + " ".join(sys.argv[1:]),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
