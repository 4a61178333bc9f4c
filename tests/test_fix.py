"""`check --fix` writes what is left and says of every other row what was done and why."""

import csv
import io
import json

import pytest

from lorikit.data.audit import audit, read
from lorikit.data.fix import changes_as_file, fix, rows_as_file
from lorikit.errors import ConfigError
from test_audit import alpaca, run_of

KEY = "AKIAJ5Q7ZK3LMNPQR2ST"
ROWS = [
    {**alpaca("who?", "Pip, a cat"), "id": 7},
    {**alpaca("who?", "Pip, a cat"), "id": 8},
    alpaca("wh\u200by?", "cafÃ©"),
    alpaca("empty", ""),
    alpaca("key?", KEY),
    alpaca("why?", "café"),
]


def fixed(folder, text, name="rows.jsonl"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    config, encoder = run_of({})
    report = audit(read([file], None, config.data), config.data, config.eval, encoder).report
    return fix([file], config.data, report)


def test_every_row_is_left_or_named_with_what_was_done(tmp_path):
    result = fixed(tmp_path, "".join(json.dumps(row) + "\n" for row in ROWS) + "{broken\n")
    assert result.rows == [ROWS[0], alpaca("why?", "café")]
    assert [(c.source.split(":")[1], c.action) for c in result.changes] == [
        ("2", "removed"), ("3", "changed"), ("4", "removed"), ("5", "removed"), ("6", "removed"), ("7", "removed"),
    ]  # fmt: skip
    reasons = [change.reason for change in result.changes]
    assert reasons[0] == "equals rows.jsonl:1" and reasons[4] == "equals rows.jsonl:3"
    assert "empty" in reasons[2] and "AWS access key" in reasons[3] and "broken JSON" in reasons[5]
    assert len(result.rows) + result.num_removed == 7 and result.num_changed == 1
    written = [json.loads(line) for line in changes_as_file(result.changes).splitlines()]
    assert written[1]["before"]["instruction"] == "wh\u200by?" and written[1]["after"]["instruction"] == "why?"
    assert written[0]["before"]["id"] == 8 and KEY not in str(written)


def test_a_mended_file_needs_no_mending(tmp_path):
    first = fixed(tmp_path, json.dumps(ROWS, indent=1), "rows.json")
    again = fixed(tmp_path, rows_as_file(first.rows, tmp_path / "x.jsonl").decode())
    assert again.changes == [] and again.rows == first.rows


@pytest.mark.parametrize("name", ["out.json", "out.jsonl", "out.csv", "out.tsv"])
def test_what_is_written_is_read_as_the_same_conversations(tmp_path, name):
    turns = [{"role": "user", "content": 'a "b"\n,c'}, {"role": "assistant", "content": "d;\te"}]
    rows = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": "你好"}]}]
    out = tmp_path / name
    out.write_bytes(rows_as_file(rows, out))
    config, _ = run_of({})
    texts = [[m.content for m in row.messages] for row in read([out], None, config.data).train.conversations]
    assert texts == [['a "b"\n,c', "d;\te"], ['a "b"\n,c', "你好"]]


def test_a_table_keeps_its_columns(tmp_path):
    result = fixed(tmp_path, "question,answer,topic\nwho?,a\u200b cat,pets\nwho?,a cat,pets\n", "rows.csv")
    table = list(csv.reader(io.StringIO(rows_as_file(result.rows, tmp_path / "o.csv").decode())))
    assert table == [["question", "answer", "topic"], ["who?", "a cat", "pets"]]


def test_rows_are_written_only_as_something_that_can_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"out\.txt: rows are written as \.json, \.jsonl, \.csv, \.tsv"):
        rows_as_file([], tmp_path / "out.txt")
