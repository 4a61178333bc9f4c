"""Whatever bytes a file holds there is no traceback, and every format reads back what was written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chat_templates import tokenizers
from lorikit.config import DataConfig, RunConfig
from lorikit.data.audit import audit, read
from lorikit.data.encode import Encoder
from lorikit.data.read import read_rows, rejects_jsonl
from lorikit.data.values import Conversation, Message
from lorikit.errors import DataError

QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.json.gz", "a.txt"]


def assert_rows_or_a_data_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        rows = read_rows([path], DataConfig(train="x"))
    except DataError as error:
        assert str(error)
    else:
        assert rows.num_rows == len(rows.conversations) + len(rows.rejects) > 0
        assert all("\n" not in str(reject) for reject in rows.rejects)
        written = [json.loads(line) for line in rejects_jsonl(rows.rejects).decode("utf-8").split("\n")[:-1]]
        assert [line["source"] for line in written] == [reject.source for reject in rows.rejects]


@given(st.sampled_from(NAMES), st.binary(max_size=200), st.sampled_from([b"", b"[", b"{", b"\xff\xfe", b'"', b"PAR1"]))
@QUICK
def test_arbitrary_bytes_are_rows_or_a_data_error(tmp_path, name, data, start):
    assert_rows_or_a_data_error(tmp_path / name, start + data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("output"), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=4), st.sampled_from(NAMES), st.sampled_from([None, 1]))
@QUICK
def test_arbitrary_json_values_are_rows_or_a_data_error(tmp_path, values, name, indent):
    assert_rows_or_a_data_error(tmp_path / name, json.dumps(values, indent=indent).encode())
    assert_rows_or_a_data_error(tmp_path / name, "\n".join(json.dumps(value) for value in values).encode())


def text(*, first: str = "") -> st.SearchStrategy[str]:
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return st.text(characters, max_size=12).map(lambda value: first + value).filter(lambda value: value.strip())


@st.composite
def conversations(draw, single: bool = False, names: bool = False) -> list[Message]:
    messages = [Message("system", draw(text()))] if draw(st.booleans()) else []
    for _ in range(1 if single else draw(st.integers(1, 3))):
        name = draw(st.none() | text()) if names else None
        messages.append(Message("user", draw(text()), name))
        reasoning = draw(st.none() | text()) if names else None
        messages.append(Message("assistant", draw(text()), reasoning=reasoning))
    return messages


def as_turns(messages: list[Message], role: str, content: str, names: dict[str, str]) -> list[dict[str, str]]:
    return [
        {role: names.get(message.role, message.role), content: message.content}
        | ({"name": message.name} if message.name is not None else {})
        | ({"reasoning_content": message.reasoning} if message.reasoning is not None else {})
        for message in messages
    ]


def as_alpaca(messages: list[Message]) -> dict[str, object]:
    system = messages[0].content if messages[0].role == "system" else ""
    said = [message.content for message in messages if message.role != "system"]
    history = [said[number : number + 2] for number in range(0, len(said) - 2, 2)]
    return {"instruction": said[-2], "input": "", "output": said[-1], "system": system, "history": history}


LAYOUTS = {
    "alpaca": as_alpaca,
    "sharegpt": lambda m: {"conversations": as_turns(m, "from", "value", {"user": "human", "assistant": "gpt"})},
    "messages": lambda m: {"messages": as_turns(m, "role", "content", {})},
    "prompt_completion": lambda m: {
        "prompt": as_turns(m[:-1], "role", "content", {}),
        "completion": as_turns(m[-1:], "role", "content", {}),
    },
}


def written(rows: list[dict[str, object]], container: str, gaps: list[int], path: Path) -> list[int]:
    """Write the rows, and say on which line each starts."""
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return list(range(1, len(rows) + 1))
    out, starts = io.StringIO(newline=""), []
    separator = "," if container.startswith("json-") else ""
    if container == "csv":
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
    out.write("[\n" if separator else "")
    for number, (row, gap) in enumerate(zip(rows, gaps, strict=False)):
        out.write("\n" * gap)
        universal = "" if container == "csv" else "\n"
        starts.append(1 + sum(line.endswith(("\n", "\r")) for line in io.StringIO(out.getvalue(), newline=universal)))
        if container == "csv":
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
        else:
            indent = 2 if container == "json-pretty" else None
            out.write(json.dumps(row, ensure_ascii=number % 2 == 0, indent=indent))
            out.write(f"{separator if number + 1 < len(rows) else ''}\n")
    path.write_bytes((out.getvalue() + ("]" if separator else "")).encode())
    return starts


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("container", ["json-pretty", "json-flat", "jsonl", "csv", "parquet"])
@given(data=st.data())
@settings(QUICK, max_examples=15)
def test_conversations_read_back_equal_with_their_lines(tmp_path, layout, container, data):
    if container == "csv" and layout == "prompt_completion":
        expected = [
            [m for m in c if m.role != "system"] for c in data.draw(st.lists(conversations(single=True), min_size=1))
        ]
        rows = [{"prompt": messages[0].content, "completion": messages[1].content} for messages in expected]
    else:
        names = layout in ("messages", "prompt_completion")
        expected = data.draw(st.lists(conversations(names=names), min_size=1, max_size=5))
        rows = [LAYOUTS[layout](messages) for messages in expected]
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    suffix = container.removesuffix("-pretty").removesuffix("-flat")
    path = tmp_path / f"rows.{suffix}"
    starts = written(rows, container, gaps, path)
    result = read_rows([path], DataConfig(train="x"))
    assert result.rejects == []
    assert result.conversations == [
        Conversation(tuple(messages), f"rows.{suffix}:{line}") for messages, line in zip(expected, starts, strict=True)
    ]


@given(st.data())
@QUICK
def test_damaged_files_are_rows_or_a_data_error(tmp_path, data):
    container = data.draw(st.sampled_from(["json-pretty", "json-flat", "jsonl", "csv", "parquet"]))
    messages = [Message("user", "你好"), Message("assistant", "hi\n")] * 2
    path = tmp_path / f"damaged.{container.removesuffix('-pretty').removesuffix('-flat')}"
    written([as_alpaca(messages)] * 4, container, [0] * 4, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 9))
        content[at : at + length] = data.draw(st.binary(max_size=4) | st.sampled_from([b'"', b"\n", b"{", b"]", b"\\"]))
    assert_rows_or_a_data_error(path, bytes(content))


@given(
    st.sampled_from(NAMES), st.binary(max_size=200) | st.lists(JSON, max_size=4).map(lambda v: json.dumps(v).encode())
)
@QUICK
def test_every_row_of_any_file_is_kept_held_out_dropped_or_a_duplicate(tmp_path, name, data):
    settings_ = RunConfig.model_validate(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "x", "on_bad_row": "skip", "max_length": 64},
            "train": {"output_dir": "o"},
            "eval": {"eval_size": 0.5},
        }
    )
    path = tmp_path / name
    path.write_bytes(data)
    try:
        found = read([path], None, settings_.data)
    except DataError:
        return
    encoder = Encoder(tokenizers()["llama3"], settings_.data)
    report = audit(found, settings_.data, settings_.eval, encoder).report.to_dict()
    kept = report["rows"]["trained"] + report["rows"]["held_out"]
    dropped = sum(len(rows) for rows in report["dropped"].values())
    assert report["rows"]["read"] == found.train.num_rows == kept + dropped + len(report["duplicates"])
