"""Whether `lorikit compare` says of four real runs what became of them: a good one, and three that are spoilt on purpose.

    python benchmarks/verdicts.py [--work DIR] [--threads 1] [--out benchmarks/results/verdicts.json]

SmolLM2-135M-Instruct learns every other row of the demo's persona (examples/persona.json), a fifth of them held out, with
the demo's settings. Then the same with one thing changed:

    good             three epochs
    learning rate    fifty times as high
    epochs           twenty instead of three, the settings otherwise as they are; the adapter that is saved is then the one
                     with the lowest held-out loss, and `last step` compares the adapter of the last step as well
    wrong labels     every answer stands under another row's question

Nothing tells the verdict which run is which: `lorikit train` and `lorikit compare` run as a user calls them. Prints and
records verdict, reasons and curve of each, and fails where a run gets another word than the table EXPECTED allows.
With --work, finished runs found there are only compared again. `seconds` are those of all trainings and comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "verdicts.json"
DEMO = {"learning_rate": 3e-3, "num_train_epochs": 3}
CHANGED: dict[str, dict[str, float]] = {
    "good": {},
    "learning rate": {"learning_rate": 50 * DEMO["learning_rate"]},
    "epochs": {"num_train_epochs": 20},
    "wrong labels": {},
}
# At least one of these words, and none of the others' (a run that forgets may have learned nothing, too).
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "good": ({"learned"}, {"overfitted", "overfitted later", "not learned", "forgets"}),
    "learning rate": ({"forgets", "not learned"}, {"learned"}),
    "epochs": ({"overfitted later", "overfitted"}, {"not learned"}),
    "epochs, last step": ({"overfitted"}, {"learned", "not learned"}),
    "wrong labels": ({"not learned"}, {"learned"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where runs are kept; by default a folder that goes at the end")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        result = {"command": " ".join(["python benchmarks/verdicts.py", *sys.argv[1:]])} | measure(
            work, arguments.threads
        )
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    wrong = [name for name, run in result["runs"].items() if not run["as_expected"]]
    if wrong:
        raise SystemExit(f"another verdict than expected: {', '.join(wrong)}")


def measure(work: Path, threads: int) -> dict[str, Any]:
    """All runs, one after another; what is written as the result."""
    load = os.getloadavg()[0]
    runs: dict[str, Any] = {}
    for name, changes in CHANGED.items():
        run = work / name.replace(" ", "-")
        rows = write_rows(work / f"{run.name}.json", wrong=name == "wrong labels")
        trained(run, rows, {**DEMO, **changes}, threads)
        runs[name] = compared(name, run, threads) | {"changed": changes, "train_seconds": train_seconds(run)}
        if name == "epochs":
            last = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
            runs["epochs, last step"] = compared("epochs, last step", last, threads) | {"adapter": last.name}
    return {
        "machine": {
            "cpu": cpu(),
            "threads": threads,
            "python": platform.python_version(),
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
        },
        "seconds": round(sum(run.get("train_seconds", 0) + run["compare_seconds"] for run in runs.values())),
        "settings": DEMO,
        "runs": runs,
    }


def write_rows(file: Path, *, wrong: bool) -> Path:
    """Every other row of the persona; `wrong` deals the answers out anew, none to its own question."""
    rows = json.loads((ROOT / "examples" / "persona.json").read_text(encoding="utf-8"))[::2]
    if wrong:
        order = list(range(len(rows)))
        random.Random(3).shuffle(order)
        answers = [row["output"] for row in rows]
        for place, number in enumerate(order):  # along one ring through all rows
            rows[number]["output"] = answers[order[(place + 1) % len(order)]]
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return file


def trained(run: Path, rows: Path, settings: dict[str, float], threads: int) -> None:
    """The run, by `lorikit train`, which does nothing where it is finished."""
    file = run.with_suffix(".yaml")
    file.write_text(
        json.dumps(
            {
                "model": {"name_or_path": "smollm2-135m-instruct"},
                "data": {"train": str(rows), "max_length": 256},
                "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0},
                "train": {
                    "output_dir": str(run),
                    "per_device_train_batch_size": 8,
                    "gradient_accumulation_steps": 1,
                    "lr_scheduler_type": "cosine",
                    "warmup_ratio": 0.1,
                    **settings,
                },
                "eval": {"eval_size": 0.2},
            }
        ),
        encoding="utf-8",
    )
    lorikit(["train", str(file), "--no-compare", "--json"], threads)


def train_seconds(run: Path) -> float:
    """What metrics.jsonl says the training took, evaluations included."""
    return float(json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["seconds"])


def compared(name: str, run: Path, threads: int) -> dict[str, Any]:
    """What `lorikit compare` says of a run."""
    found = lorikit(["compare", str(run), "--json"], threads)
    verdict = found["verdict"]
    words, (some, none) = set(verdict["words"]), EXPECTED[name]
    said = {
        "verdict": verdict["title"],
        "as_expected": bool(words & some) and not words & none,
        "sentence": verdict["sentence"],
        "reasons": [f"[{reason['tone']}] {reason['text']}" for reason in verdict["reasons"]],
        "advice": verdict["advice"],
        "curve": found["curve"],
        "compare_seconds": found["seconds"],
    }
    print(
        f"{name}: {said['verdict']}",
        *said["reasons"],
        *(f"-> {one}" for one in said["advice"]),
        sep="\n    ",
        flush=True,
    )
    return said


def lorikit(arguments: list[str], threads: int) -> dict[str, Any]:
    """The document that the command prints. A run that diverges, and says so, ends this script."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "lorikit", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def cpu() -> str:
    """What the machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
