"""Every row is accounted for: trained, held out, dropped with its reason, or a copy of one that is kept."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import tokenizers
from lorikit.config import RunConfig
from lorikit.data.account import count_tokens, measure
from lorikit.data.audit import DataSet, audit, fingerprint, prepare, read
from lorikit.data.encode import Encoder
from lorikit.data.read import Rows, rejects_jsonl
from lorikit.data.values import IGNORE, Conversation, Example, Message, Reject
from lorikit.errors import ConfigError, DataError


@cache
def settings_of(data, evaluation):
    return RunConfig(
        model={"name_or_path": "m"},
        data={"train": "rows.jsonl", **json.loads(data)},
        train={"output_dir": "runs/x"},
        eval=json.loads(evaluation),
    )


@cache
def encoder_of(kind, data):
    return Encoder(tokenizers()[kind], settings_of(data, "{}").data)


def run_of(data, evaluation=None, kind="llama3"):
    """Settings and the encoder that goes with them."""
    data, evaluation = json.dumps(data), json.dumps(evaluation if evaluation is not None else {"eval_size": 0})
    return settings_of(data, evaluation), encoder_of(kind, data)


def alpaca(question, answer):
    return {"instruction": question, "output": answer}


def prepared(folder: Path, rows, *, evaluation=None, eval_rows=None, kind="llama3", progress=None, **data):
    """The rows, written to files, as `prepare` gives them."""
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    eval_files = None
    if eval_rows is not None:
        eval_files = [folder / "questions.jsonl"]
        eval_files[0].write_text("".join(json.dumps(row) + "\n" for row in eval_rows))
    config, encoder = run_of(data, evaluation, kind)
    return prepare([file], eval_files, config, encoder, progress=progress)


def test_good_rows_are_trained_in_the_order_of_the_file(tmp_path):
    result = prepared(tmp_path, [alpaca(f"question {i}", f"answer {i}") for i in range(5)])
    assert [example.source for example in result.train] == [f"rows.jsonl:{i}" for i in range(1, 6)]
    assert result.report.to_dict()["rows"] == {"read": 5, "trained": 5, "held_out": 0, "dropped": 0, "duplicates": 0}
    assert not result.report.refused


def test_later_copies_of_a_row_are_removed_and_name_the_first(tmp_path):
    same, other = alpaca("who?", "Pip"), alpaca("who?", "Pip the cat")
    report = prepared(tmp_path, [same, other, same, {**same, "system": "Be kind."}, same]).report
    assert [(pair.source, pair.of) for pair in report.duplicates] == [
        ("rows.jsonl:3", "rows.jsonl:1"),
        ("rows.jsonl:5", "rows.jsonl:1"),
    ]
    assert report.num_trained == 3


def test_a_copy_of_a_dropped_row_is_dropped_for_the_same_reason(tmp_path):
    long = alpaca("who?", "Pip " * 100)
    report = prepared(tmp_path, [long, alpaca("who?", "Pip"), long], max_length=50).report
    assert [row.source for row in report.dropped["too_long"]] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert not report.duplicates


def test_bad_rows_stop_training_with_their_lines_and_what_to_do(tmp_path):
    rows = [alpaca("q", "a"), "{broken\n", *[alpaca("q", "")] * 6]
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, rows)
    message = str(caught.value)
    assert message.startswith("7 of 8 rows cannot be used:\n  rows.jsonl:2: ")
    assert "rows.jsonl:6: " in message and "rows.jsonl:7" not in message
    assert "and 2 more" in message and "data.on_bad_row: skip" in message


def test_bad_rows_are_left_out_and_listed_when_that_is_asked_for(tmp_path):
    rows = [alpaca("q", "a"), "{broken\n", alpaca("q", ""), alpaca("q", "a \U0010fffd character of no meaning")]
    report = prepared(tmp_path, rows, on_bad_row="skip").report
    assert report.num_trained == 1
    assert [row.source for row in report.dropped["unreadable"]] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert [row.source for row in report.dropped["refused"]] == ["rows.jsonl:4"]
    written = [json.loads(line) for line in rejects_jsonl(report.rejects).splitlines()]
    assert [line["source"] for line in written] == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4"]
    assert written[2]["row"]["messages"][0]["content"] == "q"


def test_rows_over_max_length_are_dropped_and_named(tmp_path):
    report = prepared(tmp_path, [alpaca("who?", "Pip"), alpaca("who?", "Pip " * 100)], max_length=60).report
    assert report.num_trained == 1
    assert [str(row) for row in report.dropped["too_long"]] == [f"rows.jsonl:2: {report.lengths.max} tokens, over 60"]


def test_a_row_of_exactly_max_length_is_kept_and_one_token_more_is_not(tmp_path):
    rows = [alpaca("who?", "Pip the cat")]
    exact = prepared(tmp_path, rows).report.lengths.max
    assert prepared(tmp_path, rows, max_length=exact).report.num_trained == 1
    with pytest.raises(DataError, match=f"data.max_length is {exact - 1}, {exact} would keep them all"):
        prepared(tmp_path, rows, max_length=exact - 1)


def test_truncated_rows_keep_their_labels_up_to_the_cut(tmp_path):
    rows = [alpaca("who?", "Pip " * 100), alpaca("who?", "Pip")]
    whole = prepared(tmp_path, rows).train[0]
    result = prepared(tmp_path, rows, max_length=60, on_long_row="truncate")
    assert result.train[0].input_ids == whole.input_ids[:60]
    assert result.train[0].labels == whole.labels[:60]
    assert [row.source for row in result.report.truncated] == ["rows.jsonl:1"]
    assert result.report.lengths.max == len(whole.input_ids)


def test_a_row_whose_answer_lies_behind_the_cut_is_dropped(tmp_path):
    rows = [alpaca("why? " * 100, "Pip"), alpaca("who?", "Pip")]
    report = prepared(tmp_path, rows, max_length=40, on_long_row="truncate").report
    assert [row.source for row in report.dropped["cut_off"]] == ["rows.jsonl:1"]
    assert not report.truncated and report.num_trained == 1


def test_long_rows_stop_training_when_that_is_asked_for(tmp_path):
    rows = [alpaca("who?", "Pip"), alpaca("who?", "Pip " * 100), alpaca("why?", "Pip " * 90)]
    longest = prepared(tmp_path, rows, max_length=4000).report.lengths.max
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, rows, max_length=60, on_long_row="error")
    message = str(caught.value)
    assert "2 of 3 rows longer than data.max_length:\n  rows.jsonl:2: " in message
    assert f"data.max_length: {longest} to keep them all" in message


def test_an_error_names_all_that_is_wrong_at_once(tmp_path):
    rows = [alpaca("who?", "Pip " * 100), alpaca("q", "")]
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, rows, max_length=60, on_long_row="error", evaluation={"eval_size": 9})
    message = str(caught.value)
    assert all(part in message for part in ("cannot be used", "longer than data.max_length", "leaves no row to train"))


def test_no_row_left_is_an_error_also_where_bad_rows_are_skipped(tmp_path):
    with pytest.raises(DataError, match=r"leaves no row to train: of 2 rows 2 cannot be read\.\n  rows\.jsonl:1: "):
        prepared(tmp_path, [alpaca("q", ""), alpaca("q", None)], on_bad_row="skip")


def test_as_many_held_out_rows_as_there_are_is_a_mistake_in_the_settings(tmp_path):
    with pytest.raises(ConfigError, match="eval_size is 2 rows"):
        prepared(tmp_path, [alpaca("a", "b"), alpaca("c", "d")], evaluation={"eval_size": 2})


def test_answers_to_one_prompt_stay_on_one_side(tmp_path):
    rows = [alpaca(f"question {i % 10}", f"answer {i}") for i in range(40)]
    result = prepared(tmp_path, rows, evaluation={"eval_size": 0.3})
    out = {int(example.source.split(":")[1]) - 1 for example in result.held_out}
    assert 0 < len(out) < 40 and {i % 10 for i in out}.isdisjoint(i % 10 for i in set(range(40)) - out)
    assert result.report.held_out == [example.source for example in result.held_out]


def test_a_file_of_one_prompt_says_that_nothing_is_held_out(tmp_path):
    report = prepared(tmp_path, [alpaca("q", "a"), alpaca("q", "b")], evaluation={"eval_size": 0.5}).report
    assert any("nothing is held out" in note for note in report.notes)


def test_a_held_out_file_of_its_own_is_counted_and_its_leaks_are_named(tmp_path):
    rows = [alpaca("who?", "Pip"), alpaca("WHO? ", "the cat"), alpaca("where?", "here")]
    questions = [alpaca("who?", "Pip"), alpaca("when?", "now"), alpaca("when?", "now")]
    result = prepared(tmp_path, rows, eval_rows=questions, evaluation={"data": "questions.jsonl", "eval_size": 0.5})
    report = result.report
    assert (report.num_rows, report.num_trained, report.held_out) == (6, 3, ["questions.jsonl:1", "questions.jsonl:2"])
    assert [(leak.source, leak.of) for leak in report.leaks] == [("questions.jsonl:1", "rows.jsonl:1")]
    assert [pair.source for pair in report.duplicates] == ["questions.jsonl:3"]
    assert [(file.name, file.used_for) for file in report.files] == [
        ("rows.jsonl", "train"),
        ("questions.jsonl", "eval"),
    ]


def test_a_held_out_file_without_a_usable_row_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"eval\.data leaves no row to evaluate: of 1 row 1 longer than max_length"):
        prepared(tmp_path, [alpaca("q", "a")], eval_rows=[alpaca("who?", "Pip " * 100)], max_length=60)


def test_files_of_one_name_give_sources_that_differ(tmp_path):
    files = []
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "rows.jsonl")
        files[-1].write_text(json.dumps(alpaca(f"{name}?", name)) + "\n" + json.dumps(alpaca("q", "")))
    config, encoder = run_of({"on_bad_row": "skip"})
    report = prepare([files[0]], [files[1]], config, encoder).report
    assert report.held_out == ["eval.data rows.jsonl:1"]
    assert [row.source for row in report.rejects] == ["rows.jsonl:2", "eval.data rows.jsonl:2"]


def test_a_file_can_be_checked_against_the_report(tmp_path):
    import hashlib

    report = prepared(tmp_path, [alpaca("q", "a")]).report
    content = (tmp_path / "rows.jsonl").read_bytes()
    assert report.files[0].sha256 == hashlib.sha256(content).hexdigest()
    assert report.files[0].size == len(content)


def test_a_row_of_several_examples_counts_as_one_row(tmp_path):
    turns = [("user", "two and two?"), ("assistant", "4"), ("user", "and two?"), ("assistant", "6")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    row["messages"][1]["reasoning_content"] = "easy"
    result = prepared(tmp_path, [row, alpaca("who?", "Pip")], kind="qwen3")
    assert result.report.num_trained == 2
    assert len(result.train) == result.report.train_tokens.examples == 3
    longest = max(len(example.input_ids) for example in result.train)
    report = prepared(tmp_path, [row, alpaca("who?", "Pip")], kind="qwen3", max_length=longest - 1).report
    assert [r.source for r in report.dropped["too_long"]] == ["rows.jsonl:1"]


def test_rows_that_spell_a_control_token_are_named_and_trained(tmp_path):
    rows = [alpaca("say <|eot_id|>", "no"), alpaca("say", "<|eot_id"), alpaca("say it", "<|begin_of_text|>")]
    report = prepared(tmp_path, rows).report
    assert report.control_text == ["rows.jsonl:1", "rows.jsonl:3"]
    assert report.num_trained == 3


def test_progress_ends_with_all_rows(tmp_path):
    seen = []
    rows = [alpaca(f"q {i}", "a") for i in range(250)] + ["{broken\n"]
    prepared(tmp_path, rows, on_bad_row="skip", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(100, 251), (200, 251), (251, 251)]


def test_the_report_is_json(tmp_path):
    rows = [alpaca("q", "a"), alpaca("q", "a"), alpaca("q", ""), alpaca("q", "x " * 400)]
    report = prepared(tmp_path, rows, on_bad_row="skip", max_length=60).report
    read_back = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read_back["dropped"]["unreadable"][0]["source"] == "rows.jsonl:3"
    assert read_back["duplicates"] == [{"source": "rows.jsonl:2", "of": "rows.jsonl:1"}]
    assert read_back["rows"]["read"] == 4


def test_the_fingerprint_changes_with_ids_labels_order_and_side():
    a, b = Example([1, 2, 3], [IGNORE, 2, 3], "r:1"), Example([4], [IGNORE], "r:2")
    prints = [
        fingerprint([a, b], []),
        fingerprint([b, a], []),
        fingerprint([a], [b]),
        fingerprint([replace(a, labels=[IGNORE, IGNORE, 3]), b], []),
        fingerprint([replace(a, input_ids=[1, 2], labels=[IGNORE, 2]), replace(b, input_ids=[3, 4], labels=[3, IGNORE])], []),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)
    assert fingerprint([replace(a, source="elsewhere:9"), b], []) == prints[0]


texts = st.one_of(
    st.sampled_from(["a", "b", " a", "A", "long " * 60, "why? " * 60, "\U0010fffd"]), st.text(max_size=20)
)
rows_of = st.lists(
    st.one_of(
        st.tuples(texts, texts).map(lambda pair: (Message("user", pair[0]), Message("assistant", pair[1]))),
        st.just(None),
    ),
    min_size=1,
    max_size=12,
)


def as_rows(name, rows):
    numbered = [(f"{name}:{number}", row) for number, row in enumerate(rows, 1)]
    good = [Conversation(row, source) for source, row in numbered if row]
    bad = [Reject(source, "unreadable") for source, row in numbered if not row]
    return Rows(good, bad, len(rows))


@settings(max_examples=60)
@given(
    rows_of,
    st.none() | rows_of,
    st.sampled_from(["drop", "truncate", "error"]),
    st.sampled_from(["error", "skip"]),
    st.sampled_from([1, 16, 40, 1000]),
    st.sampled_from([0, 0.05, 0.5, 0.99, 1, 3]),
)
def test_every_row_is_in_exactly_one_place(rows, eval_rows, on_long_row, on_bad_row, max_length, eval_size):
    data = {"on_long_row": on_long_row, "on_bad_row": on_bad_row, "max_length": max_length}
    config, encoder = run_of(data, {"eval_size": eval_size})
    sets = DataSet(as_rows("rows", rows), as_rows("eval", eval_rows) if eval_rows else None, [])
    try:
        result = audit(sets, config.data, config.eval, encoder)
    except ConfigError:
        assert eval_size >= 1 and not eval_rows
        return
    report = result.report
    places = [
        *dict.fromkeys(example.source for example in result.train),
        *report.held_out,
        *(row.source for dropped in report.dropped.values() for row in dropped),
        *(pair.source for pair in report.duplicates),
    ]
    every = [
        f"{name}:{i}" for name, some in (("rows", rows), ("eval", eval_rows or [])) for i in range(1, len(some) + 1)
    ]
    assert sorted(places) == sorted(every) and report.num_rows == len(every)
    assert report.num_trained == len({example.source for example in result.train})
    assert all(len(e.input_ids) <= max_length for e in [*result.train, *result.held_out])
    assert report.refused or result.train
    tokens = count_tokens(result.train)
    assert tokens == report.train_tokens and (tokens.labelled > 0 or not result.train)
    json.dumps(report.to_dict(), allow_nan=False)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=200), st.integers(1, 20_000))
def test_the_histogram_holds_every_row_and_breaks_at_max_length(lengths, max_length):
    measured = measure(lengths, max_length)
    bins = measured.histogram
    assert sum(one.rows for one in bins) == len(lengths)
    for one in bins:
        assert one.rows == sum(one.low <= length <= one.high for length in lengths)
        assert one.high <= max_length or one.low > max_length or one is bins[-1]
    assert all(left.high + 1 == right.low for left, right in pairwise(bins))
    assert sum(one.rows for one in bins if one.low > max_length) == sum(length > max_length for length in lengths)
    assert len(bins) <= 20
    assert measured.min == min(lengths) and measured.max == max(lengths)


def test_percentiles_are_nearest_ranks():
    measured = measure(range(1, 101), 1000)
    assert (measured.median, measured.p90, measured.p99, measured.mean) == (50, 90, 99, 50.5)
    assert measure([], 10) is None


def test_a_label_at_position_0_is_no_target():
    assert count_tokens([Example([5, 6, 7], [5, IGNORE, 7], "r:1")]).labelled == 1
    assert count_tokens([Example([], [], "r:1")]).labelled == 0


def test_the_tutorials_data_has_112_copies_50_prompts_with_several_answers_and_121_short_ones(tutorial_data):
    config, encoder = run_of({"max_length": 4096}, {"eval_size": 0.05})
    report = audit(read([tutorial_data], None, config.data), config.data, config.eval, encoder).report
    assert (report.num_rows, len(report.duplicates), report.num_dropped) == (3729, 112, 0)
    assert 0.03 * 3617 < len(report.held_out) < 0.07 * 3617
    findings = {finding.kind: finding for finding in report.findings}
    assert findings["duplicates"].num_rows == 112
    several = findings["several_answers"]
    assert (len(several.places), several.num_rows, len(several.places[0].rows)) == (50, 238, 51)
    assert findings["short_answers"].num_rows == 121
    assert set(findings) == {"duplicates", "several_answers", "short_answers", "near_duplicates"}
    assert report.scripts == {"Han": 3617}
