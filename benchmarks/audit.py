"""What `lorikit check` costs on 100,000 made-up rows: seconds of each stage, processor time and memory.

    python benchmarks/audit.py [--rows 100000] [--model smollm2-135m-instruct]

The rows are English and Chinese dialogue of some 60 words from a made-up vocabulary; of 100 rows, 3 are copies, 3 differ from
another in one word, 4 give another answer to a prompt that was there, 5 come from a template, and a few hold a key, an
address or a bad character. One process does what the verb does with --json, from the first import to the document; its
memory is the largest resident set. `tokens` is the time spent waiting for the encoder, which
tokenises ahead on another thread, `findings` all of the audit but that; processor seconds are those of all threads. The
prompt groups, a part of the findings, are timed once more by themselves at the end.

Prints the result, writes benchmarks/results/audit.json, and fails when the planted copies are not found.
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
        file = Path(folder) / "rows.jsonl"
        planted = write_rows(file, arguments.rows)
        command = [sys.executable, __file__, "--stages", str(file), "--model", arguments.model]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        report = json.loads(file.with_suffix(".report").read_text(encoding="utf-8"))
        size = file.stat().st_size
    findings = {finding["kind"]: finding["rows"] for finding in report["findings"]}
    result = {
        "command": f"python benchmarks/audit.py --rows {arguments.rows} --model {arguments.model}",
        "machine": {
            "cpu": cpu(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
        },
        "rows": arguments.rows,
        "file_bytes": size,
        "tokens": report["train"]["tokens"] + report["held_out"]["tokens"],
        **measured,
        "planted": planted,
        "findings": findings,
    }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    assert findings["duplicates"] >= planted["copies"], "copies were missed"
    assert findings["near_duplicates"] >= 0.8 * planted["one_word"], "nearly equal rows were missed"
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def stages(file: Path, model: str) -> dict[str, Any]:
    """The verb, in this process: seconds by the clock and of processor time, and MiB; the document beside the file."""
    times = [("start", time.perf_counter(), 0.0)]

    def stamp(name: str) -> None:
        times.append((name, time.perf_counter(), processor_seconds()))

    from lorikit.config import load_config
    from lorikit.data.audit import audit, read
    from lorikit.data.encode import Encoder
    from lorikit.data.split import group_keys
    from lorikit.data.view import Check
    from lorikit.hub import resolve_model
    from lorikit.model.load import load_tokenizer, stop_ids

    class Timed(Encoder):
        clock, processor = 0.0, 0.0

        def encode_all(self, conversations):
            encoded = super().encode_all(conversations)
            while True:
                clock, processor = time.perf_counter(), time.process_time()
                examples = next(encoded, None)
                self.clock += time.perf_counter() - clock
                self.processor += time.process_time() - processor
                if examples is None:
                    return
                yield examples

    config = load_config(model={"name_or_path": model}, data={"train": str(file)}, train={"output_dir": "none"})
    base = resolve_model(model)
    encoder = Timed(load_tokenizer(base.path), config.data, stop_ids(base.path))
    stamp("imports and tokenizer")
    data = read([file], None, config.data)
    stamp("read")
    prepared = audit(data, config.data, config.eval, encoder)
    stamp("audit")
    document = json.dumps(Check(prepared.report, []).to_dict(), ensure_ascii=False, indent=2)
    file.with_suffix(".report").write_text(document, encoding="utf-8")
    stamp("document")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    group_keys(data.train.conversations)
    stamp("prompt groups, once more")
    parts = {name: [b - a, d - c] for (_, a, c), (name, b, d) in pairwise(times)}
    everything = parts.pop("audit")
    parts["tokens"] = [encoder.clock, encoder.processor]
    parts["findings"] = [everything[0] - encoder.clock, everything[1] - encoder.processor]
    again = parts["prompt groups, once more"]
    total = [sum(part[side] for part in parts.values()) - again[side] for side in (0, 1)]
    parts |= {
        "whole check": total,
        "whole check without tokens": [total[0] - encoder.clock, total[1] - encoder.processor],
    }
    rounded = {name: {"seconds": round(a, 1), "cpu_seconds": round(b, 1)} for name, (a, b) in parts.items()}
    return {"stages": rounded, "peak_mib": round(peak)}


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


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
