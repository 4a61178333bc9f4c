"""What `lorikit check` costs on 100,000 made-up rows: seconds and memory of the whole verb, and of its stages.

    python benchmarks/audit.py [--rows 100000] [--model smollm2-135m-instruct]

The rows are English and Chinese dialogue of some 60 words from a made-up vocabulary; of 100 rows, 3 are copies, 3 differ from
another in one word, 4 give another answer to a prompt that was there, 5 come from a template, and a few hold a key, an
address or a bad character. The verb runs as a process of its own with --json, as a person would start it; its memory is
the largest resident set. The stages are timed in one more process. Prints both, writes benchmarks/results/audit.json, and
fails when fewer than the planted copies are found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "audit.json"
LETTERS = "aaabcdeeefghiiklmnnooprrssttuvwy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stages", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages:
        print(json.dumps(stages(Path(arguments.stages), arguments.model)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file, found = Path(folder) / "rows.jsonl", Path(folder) / "report.json"
        planted = write_rows(file, arguments.rows)
        whole = verb(file, found, arguments.model)
        report = json.loads(found.read_text(encoding="utf-8"))
        command = [sys.executable, __file__, "--stages", str(file), "--model", arguments.model]
        parts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = file.stat().st_size
    findings = {finding["kind"]: finding["rows"] for finding in report["findings"]}
    result = {
        "command": f"python benchmarks/audit.py --rows {arguments.rows} --model {arguments.model}",
        "machine": {"cpu": cpu(), "cpus": os.cpu_count(), "python": platform.python_version(), "load_before": load},
        "rows": arguments.rows,
        "file_bytes": size,
        "tokens": report["train"]["tokens"] + report["held_out"]["tokens"],
        "check": whole,
        "stages_seconds": parts,
        "planted": planted,
        "findings": findings,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    assert findings["duplicates"] >= planted["copies"], "copies were missed"
    assert findings["near_duplicates"] >= 0.8 * planted["one_word"], "nearly equal rows were missed"
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def verb(file: Path, out: Path, model: str) -> dict[str, float]:
    """Seconds by the clock and of processor time, and MiB, of `lorikit check`."""
    start = time.perf_counter()
    with out.open("wb") as stream:
        command = [sys.executable, "-m", "lorikit", "check", str(file), "--model", model, "--json"]
        subprocess.run(command, check=True, stdout=stream)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def stages(file: Path, model: str) -> dict[str, float]:
    """Seconds of each part of the audit, by the clock."""
    from lorikit.config import load_config
    from lorikit.data.audit import audit, read
    from lorikit.data.encode import Encoder
    from lorikit.data.split import group_keys
    from lorikit.hub import resolve_model
    from lorikit.model.load import load_tokenizer, stop_ids

    class Timed(Encoder):
        seconds = 0.0

        def encode(self, conversation):
            start = time.perf_counter()
            examples = super().encode(conversation)
            self.seconds += time.perf_counter() - start
            return examples

    config = load_config(model={"name_or_path": model}, data={"train": str(file)}, train={"output_dir": "none"})
    base = resolve_model(model)
    encoder = Timed(load_tokenizer(base.path), config.data, stop_ids(base.path))
    times = [time.perf_counter()]
    data = read([file], None, config.data)
    times.append(time.perf_counter())
    group_keys(data.train.conversations)
    times.append(time.perf_counter())
    audit(data, config.data, config.eval, encoder)
    times.append(time.perf_counter())
    reading, groups, everything = (b - a for a, b in pairwise(times))
    parts = {"read": reading, "audit": everything, "of it tokens": encoder.seconds, "of it prompt groups": groups}
    parts["read and audit without tokens"] = reading + everything - encoder.seconds
    return {name: round(seconds, 1) for name, seconds in parts.items()}


def write_rows(file: Path, num_rows: int) -> dict[str, int]:
    """Write the rows; how many of each kind are in them."""
    rng = random.Random(7)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(20_000)]
    signs = [chr(rng.randint(0x4E00, 0x7FFF)) for _ in range(3_000)]
    template = "Translate the following sentence into plain words and keep the tone of the original, please: "
    planted = {"copies": 0, "one_word": 0, "other_answer": 0, "template": 0, "key": 0, "address": 0, "character": 0}

    def text(low: int, high: int) -> str:
        length = rng.randint(low, high)
        if rng.random() < 0.3:
            return "".join(rng.choices(signs, k=2 * length)) + "。"
        return " ".join(rng.choices(words, k=length)).capitalize() + "."

    rows: list[dict[str, Any]] = []
    while len(rows) < num_rows:
        row = {"instruction": text(5, 25), "output": text(10, 70)}
        old, chance = (rng.choice(rows) if rows else row), rng.random()
        if chance < 0.03 and rows:
            row, kind = dict(old), "copies"
        elif chance < 0.06 and len(old["output"].split()) > 20:
            parts = old["output"].split()
            parts[10] = rng.choice(words)
            row, kind = {**old, "output": " ".join(parts)}, "one_word"
        elif chance < 0.10 and rows:
            row, kind = {**old, "output": row["output"]}, "other_answer"
        elif chance < 0.15:
            row, kind = {**row, "instruction": template + text(3, 6)}, "template"
        elif chance < 0.151:
            row, kind = {**row, "output": f"{row['output']} ghp_{''.join(rng.choices('aB3dE5gH7', k=36))}"}, "key"
        elif chance < 0.153:
            row, kind = {**row, "output": f"{row['output']} {rng.choice(words)}@{rng.choice(words)}.org"}, "address"
        elif chance < 0.155:
            row, kind = {**row, "output": row["output"] + "\u200b"}, "character"
        else:
            kind = ""
        if kind:
            planted[kind] += 1
        rows.append(row)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return planted


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
