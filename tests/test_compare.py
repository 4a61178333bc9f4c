"""Before and after: the verdict on runs of every kind, the panel, the page, and the command line around them."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from lorikit.cli_report import compare_after_training
from lorikit.config import dump_config, load_config
from lorikit.data.values import Conversation, Message
from lorikit.report.compare import compare, curve_of, is_compared
from lorikit.report.losses import mean_and_error, spaced
from lorikit.report.panel import chance, outcome, panel
from lorikit.report.texts import chrf, near_copies, side
from lorikit.report.values import Asked, Comparison, Curve, Fit, Losses, Panelled, Said
from lorikit.report.verdict import judge
from tiny_model import save_adapter, save_model

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil {{ 7*7 }} </td>"
ROWS = [{"instruction": f"What is {k}?", "input": "", "output": f"It is {k} and nothing else."} for k in range(14)]
ROWS[3]["output"] = HOSTILE
ROWS[5]["instruction"] = HOSTILE


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A YAML file and its folder; the run is made by the tests that need it."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    settings = {
        "model": {"name_or_path": str(save_model(folder / "base"))},
        "data": {"train": str(folder / "rows.json"), "max_length": 250},
        "train": {"output_dir": str(folder / "run"), "num_train_epochs": 4, "logging_steps": 1, "learning_rate": 2e-2},
        "eval": {"eval_size": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def losses(base, tuned, error=0.05, rows=20):
    return Losses(rows, rows, 10 * rows, base, tuned, base - tuned, error, rows if tuned < base else 0)


def panelled(kept=20, lost=0, gained=0):
    said = Said("x", True, 1)
    words = ["kept"] * kept + ["lost"] * lost + ["gained"] * gained
    return [Panelled(f"q{i}", "knowledge", "?", said, said, word) for i, word in enumerate(words)]


GOOD = Comparison(
    run="r",
    base_name="b",
    adapter_sha256="0",
    held_out=losses(3.0, 1.5),
    trained=losses(3.0, 1.0),
    fit=Fit(20, 0.2, 0.05, 0.8, 0.1),
    answers=[],
    base_side=None,
    tuned_side=None,
    panel=panelled(),
    near_copies=[],
    worst=[],
    curve=Curve(1.5, 30, 1.5, 30, 30, 1.5, 30, 2.0),
    max_new_tokens=32,
    rows_sha256="a",
    tokens_sha256="b",
    seconds=1.0,
    device="cpu",
)
LATE = Curve(1.5, 10, 2.5, 60, 60, 2.5, 60, 2.0)
CASES = {
    "a good run": ({}, ("learned",)),
    "better on its rows only": ({"held_out": losses(3.0, 2.95)}, ("overfitted",)),
    "little of it carries over": ({"held_out": losses(3.0, 2.7)}, ("overfitted",)),
    "it was better earlier": ({"curve": LATE}, ("overfitted",)),
    "saved when it was best": ({"curve": replace(LATE, saved=1.5, saved_step=10)}, ("learned", "overfitted later")),
    "hardly worse afterwards": ({"curve": replace(LATE, saved=1.5, saved_step=10, last=1.6)}, ("learned",)),
    "questions make no difference": ({"fit": Fit(20, 0.0, 0.1, 0.1, 0.1)}, ("not learned",)),
    "too few rows to tell": ({"fit": Fit(4, 0.0, 0.1, 0.1, 0.1)}, ("learned",)),
    "nothing moved": ({"held_out": losses(3.0, 2.99), "trained": losses(3.0, 2.98)}, ("not learned",)),
    "worse everywhere": (
        {"held_out": losses(3.0, 9.0), "trained": losses(3.0, 9.0), "panel": panelled(0, 20)},
        ("forgets", "not learned"),
    ),
    "learned at a price": ({"panel": panelled(12, 8)}, ("learned", "forgets")),
    "a loss that chance makes too": ({"panel": panelled(17, 3, 2)}, ("learned",)),
    "no held-out rows": ({"held_out": None, "fit": None, "curve": None}, ("unproven",)),
    "no rows at all": ({"held_out": None, "trained": None, "fit": None, "curve": None}, ("unproven",)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_names_what_happened_with_its_reasons(case):
    changes, words = CASES[case]
    verdict = judge(replace(GOOD, **changes))
    assert verdict.words == words
    assert verdict.sentence and verdict.reasons
    if words == ("learned",):
        assert "bad" not in {
            reason.tone for reason in verdict.reasons if not reason.text.startswith("the held-out loss")
        }
    elif words != ("unproven",):
        assert "bad" in {reason.tone for reason in verdict.reasons}


def test_a_checkpoint_is_held_against_the_held_out_losses_of_its_run(tmp_path):
    lines = [{"step": step, "epoch": step / 10, "eval_loss": loss} for step, loss in ((10, 2.0), (20, 1.5), (30, 2.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").touch()
    for name in ("adapter", "checkpoint-10", "checkpoint-15", "checkpoint-30"):
        (tmp_path / name).mkdir()
    steps = {name: curve_of(tmp_path / name, True) for name in ("", "adapter", "checkpoint-10", "checkpoint-30")}
    assert [(curve.saved_step, curve.saved) for curve in steps.values()] == [(20, 1.5), (20, 1.5), (10, 2.0), (30, 2.5)]
    assert {curve.lowest for curve in steps.values()} == {1.5}
    assert curve_of(tmp_path / "checkpoint-15", True) is None
    assert judge(replace(GOOD, curve=steps["checkpoint-30"])).words == ("overfitted",)
    early = judge(replace(GOOD, curve=steps["checkpoint-10"]))
    assert "overfitted" not in early.words, "a checkpoint from before the lowest loss has more to learn, not less"


def test_steps_in_vain_are_told_with_the_epochs_that_would_do():
    verdict = judge(replace(GOOD, curve=replace(LATE, saved=1.5, saved_step=10)))
    assert any("train.num_train_epochs: 2 " in line for line in verdict.advice)


def test_the_panel_has_forty_questions_and_its_answers_can_be_told_right_from_wrong():
    right = {
        "knowledge-4": ("Water is H₂O.", "Water is HO2."),
        "instruction-1": ("Yes.", "Yes, of course I can say that."),
        "instruction-4": ("1, 2, 3, 4, 5", "1, 2, 3, 4"),
        "arithmetic-1": ("2 + 2 = 4.", "It is 42, or 14."),
        "arithmetic-6": ("Half of 50 is 25.", "It is 25.5"),
        "language-7": ("中国的首都是北京。", "上海"),
        "language-10": ("москва", "Санкт-Петербург"),
    }
    questions = {one.name: one for one in panel()}
    assert len(questions) == len(panel()) == 40
    assert all(bool(one.accept) != bool(one.pattern) for one in panel())
    assert not any(one.is_right("") or one.is_right("I mend clocks in Puddlewharf.") for one in panel())
    for name, (good, bad) in right.items():
        assert questions[name].is_right(good) and not questions[name].is_right(bad), name


def test_losses_of_the_panel_count_when_they_are_more_than_chance():
    assert chance(["kept"] * 9) == 1.0
    assert chance(["lost"] * 5) == pytest.approx(1 / 32)
    assert chance(["lost", "gained"]) == pytest.approx(0.75)
    assert [outcome(a, b) for a in (True, False) for b in (True, False)] == ["kept", "lost", "gained", "never"]


def test_the_standard_error_is_that_of_a_mean_where_all_rows_are_equally_long():
    values = [1.0, 2.0, 4.0, 9.0]
    mean, error = mean_and_error([(value, 1) for value in values])
    spread = sum((value - 4.0) ** 2 for value in values) / 3
    assert (mean, error) == (4.0, pytest.approx((spread / 4) ** 0.5))
    assert mean_and_error([(3.0, 2)]) == (1.5, None)
    assert spaced(10, 4) == [0, 2, 5, 7] and spaced(3, 9) == [0, 1, 2]


def test_answers_are_held_against_the_data():
    said = [Said("It is  5.", True, 3), Said("no", False, 1)]
    counted = side(said, ["It is 5.", "yes"])
    assert (counted.exact, counted.stopped) == (1, 1)
    pytest.importorskip("sacrebleu")
    assert chrf(["abc def"], ["abc def"]) == pytest.approx(100.0)
    assert counted.chrf is not None and 0 < counted.chrf < 100


def test_an_answer_of_another_row_is_a_near_copy_and_its_own_is_none():
    learnt = "My house is the old lighthouse beyond the harbour."
    rows = [Conversation((Message("user", "Where?"), Message("assistant", learnt)), "a.json:1")]
    said, wrong = Said(learnt.upper(), True, 9), "I was born in the month of February, long ago."
    found = near_copies(
        [Asked("b", "When?", wrong, said, said), Asked("c", "Where do you live?", learnt, said, said)], rows
    )
    assert [(one.question, one.source) for one in found] == [("When?", "a.json:1")]


def test_training_compares_and_reports_and_the_page_escapes_what_the_rows_say(lorikit, trained):
    run = trained / "run"
    code, out, err = lorikit("train", trained / "run.yaml", "--json")
    assert code == 0 and json.loads(out)["run"] == str(run)
    assert "panel questions" in err and "report.html" in err
    found = json.loads((run / "compare.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert found["held_out"]["tuned"] == pytest.approx(best, rel=1e-4)
    assert found["held_out"]["num_rows"] == 4 and len(found["answers"]) == 4 and len(found["panel"]) == 40
    assert found["held_out"]["base"] > found["held_out"]["tuned"] and found["trained"]["gain"] > 0
    page = (run / "report.html").read_text()
    assert "<script" not in page and "<img" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7*7 }}" in page
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page.replace(HOSTILE, "").replace("src=x onerror", ""))
    assert "lorikit" in page and page.count("<svg") >= 5
    assert is_compared(run) and not list(run.glob(".staging*"))
    before = (run / "compare.json").stat().st_mtime_ns
    code, _, err = lorikit("train", trained / "run.yaml")
    assert code == 0 and "panel" not in err and (run / "compare.json").stat().st_mtime_ns == before

    again = json.loads(json.dumps(compare(run).to_dict()))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}

    code, out, _ = lorikit("runs", trained, "--json")
    (row,) = json.loads(out)
    assert (code, row["run"], row["finished"], row["problem"]) == (0, "run", True, None)
    assert row["verdict"] == found["verdict"]["title"] and row["tokens_per_second"] > 0
    code, out, _ = lorikit("compare", run, run, "--json")
    assert code == 0 and json.loads(out)["not_compared"] == []

    (trained / "rows.json").write_text(json.dumps(ROWS[1:]))
    changed = compare(run).comparison
    assert changed.held_out is None and any("other rows" in line for line in changed.unknown)


def test_an_adapter_in_no_run_is_asked_the_panel_and_nothing_is_written(lorikit, trained, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", trained / "base")
    before = sorted(adapter.iterdir())
    code, out, _ = lorikit("compare", adapter, "--json")
    found = json.loads(out)
    assert code == 0 and found["verdict"]["words"] == ["unproven"] and len(found["panel"]) == 40
    assert "no run folder" in found["unknown"][0] and sorted(adapter.iterdir()) == before


def test_train_does_not_compare_where_it_is_told_so_and_bad_input_is_named(lorikit, trained, tmp_path):
    run = tmp_path / "short"
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(ROWS))
    more = ["--train.output_dir", run, "--train.max_steps", 1, "--eval.eval_size", 0, "--data.train", rows]
    code, _, err = lorikit("train", trained / "run.yaml", *more, "--no-compare")
    assert code == 0 and not (run / "compare.json").exists() and "panel" not in err
    assert lorikit("compare", tmp_path / "nothing")[0] == 4
    assert lorikit("compare", run, "--rows", 0)[0] == 2
    code, _, err = lorikit("compare", run, run)
    assert code == 3 and "lorikit compare" in err
    code, _, err = lorikit("runs", tmp_path / "nothing")
    assert code == 2 and "no such folder" in err


def test_a_comparison_that_fails_at_the_end_of_training_is_told_and_raises_nothing(tmp_path, capsys):
    compare_after_training(tmp_path / "gone")
    said = capsys.readouterr().err
    assert "run is finished" in said and "ModelError" in said and "lorikit compare" in said


def test_runs_that_were_judged_on_other_rows_are_compared_only_as_far_as_that_goes(lorikit, tmp_path):
    for name, rows, tokens in (("a", "1", "1"), ("b", "1", "2"), ("c", "2", "2")):
        (tmp_path / name).mkdir()
        found = replace(GOOD, rows_sha256=rows, tokens_sha256=tokens, tuned_side=side([], []), base_side=side([], []))
        values = found.to_dict() | {"verdict": {"title": "learned"}}
        (tmp_path / name / "compare.json").write_text(json.dumps(values))
    beside = {n: json.loads(lorikit("compare", tmp_path / "a", tmp_path / n, "--json")[1]) for n in "abc"}
    assert beside["a"]["not_compared"] == [] and "held-out loss, tuned" in beside["a"]["figures"]
    assert "other tokens" in beside["b"]["not_compared"][0] and "chrF" in beside["b"]["figures"]
    assert "held-out loss, tuned" not in beside["b"]["figures"]
    assert "other held-out rows" in beside["c"]["not_compared"][0] and "chrF" not in beside["c"]["figures"]
    assert beside["c"]["figures"]["panel: kept"] == [20, 20]
    assert "not compared" in lorikit("compare", tmp_path / "a", tmp_path / "c")[1]


def test_two_runs_become_a_page_with_their_curves_over_each_other(lorikit, tmp_path):
    for name, rate in (("a<script>", 1e-3), ("b", 2e-3)):
        run = tmp_path / name
        run.mkdir()
        config = load_config(
            model={"name_or_path": "m"}, data={"train": "x"}, train={"output_dir": "o", "learning_rate": rate}
        )
        (run / "config.yaml").write_text(dump_config(config))
        lines = [{"step": step, "loss": 3 / step, "eval_loss": 4 / step} for step in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = replace(GOOD, rows_sha256="1", tokens_sha256="1").to_dict() | {"verdict": {"title": "learned"}}
        (run / "compare.json").write_text(json.dumps(values))
    page = tmp_path / "both.html"
    code, _, err = lorikit("compare", tmp_path / "a<script>", tmp_path / "b", "--output", page)
    text = page.read_text()
    assert code == 0 and str(page) in err
    assert text.count('<polyline class="c0"') == text.count('<polyline class="c1"') == 2
    assert "a&lt;script&gt;" in text and "<script" not in text and "://" not in text
    assert "train.learning_rate" in text and "0.002" in text and "output_dir" not in text
    assert lorikit("compare", tmp_path / "b", "--output", page)[0] == 2
