"""Every row of a file is a conversation or a reject with its line, whatever the file holds."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorikit.config import DataConfig
from lorikit.data.build import read_materials
from lorikit.data.read import Rows, data_files, read_rows, rejects_jsonl
from lorikit.data.records import Reading
from lorikit.data.values import Message, Reject
from lorikit.errors import DataError

GOOD = '{"instruction": "a", "output": "b"}'
TUTORIAL = Path(
    os.environ.get("LORIKIT_TUTORIAL_DATA") or Path(__file__).parents[2] / "shared" / "data" / "huanhuan.json"
)


def read(path: Path, content: str | bytes | None = None, **settings_: object) -> Rows:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    rows = read_rows([path], DataConfig.model_validate({"train": "x", **settings_}))
    assert rows.num_rows == len(rows.conversations) + len(rows.rejects)
    return rows


def lines(rows: Rows) -> list[int]:
    return [_line(conversation.source) for conversation in rows.conversations]


def rejects(rows: Rows) -> list[tuple[int, str]]:
    return [(_line(reject.source), reject.reason) for reject in rows.rejects]


def _line(source: str) -> int:
    return int(source.rsplit(":", 1)[1].partition(" ")[0])


def failure(path: Path, content: str | bytes | None = None, **settings_: object) -> str:
    with pytest.raises(DataError) as error:
        read(path, content, **settings_)
    assert str(path) in str(error.value) or path.name in str(error.value)
    return str(error.value)


@pytest.mark.skipif(not TUTORIAL.exists(), reason="the tutorial's data is not here")
def test_the_tutorials_rows_are_all_read_with_the_lines_they_start_on():
    rows = read(TUTORIAL, template="tutorial")
    assert (rows.num_rows, rows.rejects) == (3729, [])
    assert sum(len(conversation.messages[1].content) <= 3 for conversation in rows.conversations) == 121
    text = TUTORIAL.read_text(encoding="utf-8").split("\n")
    for conversation, row in zip(rows.conversations, json.loads("\n".join(text)), strict=True):
        expected = (Message("user", row["instruction"] + row["input"]), Message("assistant", row["output"]))
        assert conversation.messages == expected
        line = int(conversation.source.removeprefix(f"{TUTORIAL.name}:"))
        assert text[line - 1].strip() == "{"
        assert json.dumps(row["instruction"], ensure_ascii=False) in text[line]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.json", f"[\n  {GOOD},\n\n  {GOOD}\n]\n", [2, 4]),
        ("a.json", f"[{GOOD}, {GOOD}]", [1, 1]),
        ("a.json", json.dumps([json.loads(GOOD)] * 2, indent=4), [2, 6]),
        ("a.json", f'{{"version": 1.5, "name": "x",\n "data": [\n{GOOD},\n{GOOD}\n],\n "license": "none"}}', [3, 4]),
        ("a.json", f'{{"data": [{GOOD}]}}', [1]),
        ("a.json", GOOD, [1]),
        ("a.json", json.dumps(json.loads(GOOD), indent=1), [1]),
        ("a.json", f"{GOOD}\n{GOOD}\n", [1, 2]),
        ("a.jsonl", f"\n{GOOD}\r\n\r\n  {GOOD}", [2, 4]),
        ("a.jsonl", f"[\n{GOOD},\n{GOOD}\n]", [2, 3]),
        ("a.jsonl", json.dumps(json.loads(GOOD), indent=1) + "\n" + GOOD, [1, 5]),
        ("a.NDJSON", GOOD, [1]),
        ("a.txt", GOOD, [1]),
        ("a.csv", GOOD, [1]),
        ("a.csv", 'instruction,output\na,b\n\n"a\n\n",b\nc,d\n', [2, 4, 7]),
        ("a.csv", "id;instruction;output\r\n1;a;b\r\n", [2]),
        ("a.csv", " instruction , output\na,b", [2]),
        ("a.tsv", "instruction\toutput\na,b\tc", [2]),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), [1]),
        ("a.csv", b"\xef\xbb\xbfinstruction,output\na,b", [2]),
        ("a.json", f"[\n{GOOD}]".encode("utf-16"), [2]),
        ("a.jsonl", f"{GOOD}\n{GOOD}".encode("utf-16-be").join([b"\xfe\xff", b""]), [1, 2]),
        ("a.csv", "instruction,output\r\na,b".encode("utf-32"), [2]),
        ("a.jsonl.gz", gzip.compress(f"{GOOD}\n{GOOD}".encode(), mtime=0), [1, 2]),
        ("a.csv.gz", gzip.compress(b"instruction,output\na,b", mtime=0), [2]),
    ],
)
def test_files_are_read_whatever_their_suffix_and_encoding(tmp_path, name, content, where):
    rows = read(tmp_path / name, content)
    assert lines(rows) == where
    assert rows.rejects == []
    assert rows.conversations[0].source.partition(" ")[0] == f"{name}:{where[0]}"


def test_a_row_around_a_list_is_not_taken_for_an_object_around_rows(tmp_path):
    row = {"id": 3, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert lines(read(tmp_path / "a.json", json.dumps(row))) == [1]
    row = {"talk": row["messages"]}
    assert lines(read(tmp_path / "a.json", json.dumps(row, indent=1), columns={"messages": "talk"})) == [1]


ROW = '"instruction": "a", "output"'
SURROGATE = f'{{{ROW}: "\\ud83d"}}'


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ('{"instruction": "a", "output": b}', "broken JSON: Expecting value (line 2, column 32)"),
        ('{"instruction": "a" "output": "b"}', "broken JSON: Expecting ',' delimiter (line 2, column 21)"),
        ("{'instruction': 'a'}", "broken JSON: Expecting property name"),
        (f'{{{ROW}: "b\tc"}}', "broken JSON: Invalid control character (line 2, column 34)"),
        (f'{{{ROW}: "b", "output": "c"}}', "the key 'output' stands twice in one object"),
        ('{"messages": [{"role": "user", "role": "system"}]}', "the key 'role' stands twice"),
        (f"{{{ROW}: NaN}}", "output is NaN where text belongs"),
        (f"{{{ROW}: null}}", "output is null"),
        (f"{{{ROW}: {'9' * 5000}}}", "output is a number"),
        (f"{{{ROW}: 1e999}}", "output is a number"),
        (f"{{{ROW}: {'[' * 100_000}{']' * 100_000}}}", "nested too deeply"),
        (SURROGATE, "half a character, \\ud83d"),
        (f'{{{ROW}: "\\u0000"}}', "NUL character"),
        ('{"text": "a"}', "no recognised columns: found 'text'"),
        ('"just text"', "the row is text where an object"),
        ("17", "the row is a number"),
    ],
)
def test_a_bad_row_costs_itself_and_not_its_neighbours(tmp_path, bad, expected):
    rows = read(tmp_path / "a.jsonl", f"{GOOD}\n{bad}\n{GOOD}\n")
    assert lines(rows) == [1, 3]
    assert [line for line, _ in rejects(rows)] == [2]
    assert expected in rows.rejects[0].reason
    assert str(rows.rejects[0]).startswith("a.jsonl:2: ")
    in_array = read(tmp_path / "a.json", f"[{GOOD},\n{bad},\n{GOOD}]")
    assert lines(in_array) == [1, 3]
    assert in_array.rejects[0].source == "a.json:2"
    assert in_array.rejects[0].reason == rows.rejects[0].reason


def test_text_after_a_row_is_refused(tmp_path):
    rows = read(tmp_path / "a.jsonl", f"{GOOD}\n{GOOD} {GOOD}\n")
    assert rejects(rows) == [(2, "broken JSON: text after the end of the row (line 2, column 36)")]


def test_a_broken_row_of_several_lines_is_skipped_to_the_next_of_its_kind(tmp_path):
    rows = json.dumps(
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 4, indent=2
    )
    broken = rows.replace('"gpt"', "gpt", 1)
    read_ = read(tmp_path / "a.json", broken)
    assert lines(read_) == [14, 26, 38]
    assert rejects(read_) == [(2, "broken JSON: Expecting value (line 9, column 17)")]


def test_a_broken_row_of_a_file_without_line_breaks_is_skipped_by_its_first_key(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    text = json.dumps([{"conversations": turns}] * 3).replace('"gpt"', "gpt", 1)
    rows = read(tmp_path / "a.json", text)
    assert (len(rows.conversations), len(rows.rejects)) == (2, 1)


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        (f"[\n{GOOD},\n{GOOD}\n", 4, "the array is not closed"),
        (f'[\n{GOOD},\n{{"instruction": "a", "out', 3, "Unterminated string"),
        (f"[\n{GOOD}\n]\n[\n{GOOD}\n]", 3, "text after the array of rows"),
        (f'{{"train": [\n{GOOD}],\n"test": [\n{GOOD}]}}', 2, "text after the array of rows"),
        (f"[\n{GOOD},\noops\n]", 3, "broken JSON: Expecting value (line 3, column 1); no row was found after it"),
    ],
)
def test_what_cannot_be_read_at_the_end_is_one_reject(tmp_path, content, line, expected):
    rows = read(tmp_path / "a.json", content)
    assert rows.conversations
    assert [found for found, _ in rejects(rows)] == [line]
    assert expected in rows.rejects[0].reason


def test_rows_that_share_a_line_have_a_name_each(tmp_path):
    rows = read(tmp_path / "a.json", f'[{GOOD}, {GOOD}, 7,\n{GOOD},\n\n{GOOD}, {{"instruction": "a"}}]')
    assert [row.source for row in rows.conversations] == [
        "a.json:1 row 1",
        "a.json:1 row 2",
        "a.json:2",
        "a.json:4 row 1",
    ]
    assert [reject.source for reject in rows.rejects] == ["a.json:1 row 3", "a.json:4 row 2"]
    assert lines(read(tmp_path / "a.jsonl", f"{GOOD}\n{GOOD}\n")) == [1, 2]


def test_comments_between_rows_are_passed_over_and_elsewhere_named(tmp_path):
    rows = read(tmp_path / "a.json", f"// rows\n[ /* the\n first */ {GOOD}, // {'{'}\n{GOOD}\n] // end\n")
    assert lines(rows) == [3, 4] and not rows.rejects
    rows = read(tmp_path / "b.json", f'[\n{{"instruction": // why\n"a", "output": "b"}},\n{GOOD}, /* open\n]')
    assert lines(rows) == [4]
    assert "a comment stands here, which JSON does not have (line 2, column 17)" in rows.rejects[0].reason


def test_what_follows_an_array_is_looked_at_in_no_more_time_than_reading_takes(tmp_path):
    begun = time.monotonic()
    rows = read(tmp_path / "a.json", f"[{GOOD}]" + " " * 5000 + "x")
    assert len(rows.conversations) == 1 and "text after the array of rows is not read" in rows.rejects[0].reason
    assert time.monotonic() - begun < 5


def test_a_comment_before_an_object_around_the_rows_does_not_hide_them(tmp_path):
    assert lines(read(tmp_path / "a.json", f'// exported\n{{"data": [{GOOD},\n{GOOD}]}}')) == [2, 3]


def test_joined_files_lone_returns_and_names_in_capitals_are_called_what_they_are(tmp_path):
    rows = read(tmp_path / "a.jsonl", f"\ufeff{GOOD}\n\ufeff{GOOD}\n")
    assert lines(rows) == [1] and "a byte order mark stands here" in rejects(rows)[0][1]
    assert "CR alone" in rejects(read(tmp_path / "b.jsonl", f"{GOOD}\r{GOOD}\r"))[0][1]
    capitals = failure(tmp_path / "c.jsonl", '{"Question": "a", "Answer ": "b"}')
    assert 'such as {instruction: Question, output: "Answer "}' in capitals
    assert lines(read(tmp_path / "d.csv", "instruction|output\na, b|c\n")) == [2]


def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "a pipe" in failure(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="a pipe"):
        read_materials([tmp_path / "a.jsonl"], Reading({}))
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="a pipe"):
        read_materials([tmp_path / "a.txt"], Reading({}))


def test_a_row_of_30_mib_is_refused_and_the_rows_after_it_are_read(tmp_path):
    huge = f'{{"instruction": "a", "output": "{"b" * (30 * 2**20)}"}}'
    for name, text in [
        ("a.jsonl", f"{GOOD}\n{huge}\n{GOOD}\n"),
        ("a.json", f"[{GOOD},\n{huge},\n{GOOD}]"),
        ("a.csv", f"instruction,output\na,{'b' * (30 * 2**20)}\na,b\n"),
    ]:
        rows = read(tmp_path / name, text)
        assert lines(rows) == ([1, 3] if name != "a.csv" else [3])
        assert [line for line, _ in rejects(rows)] == [2]
        assert "longer than 8 Mi characters" in rows.rejects[0].reason
    pq.write_table(pa.table({"prompt": ["a", "a"], "completion": ["b" * (30 * 2**20), "b"]}), tmp_path / "a.parquet")
    assert "longer than 8 Mi characters" in read(tmp_path / "a.parquet").rejects[0].reason


def test_a_long_csv_field_is_read_and_the_limit_of_the_process_is_left_alone(tmp_path):
    before = csv.field_size_limit()
    rows = read(tmp_path / "a.csv", f"instruction,output\na,{'b' * 200_000}\n")
    assert len(rows.conversations[0].messages[1].content) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "good", "bad", "expected"),
    [
        ("a,b\nc\nd,e\n", [2, 4], 3, "1 fields where the header has 2"),
        ("a,b\nc,d,e\nf,g\n", [2, 4], 3, "3 fields where the header has 2"),
        ('a,b\n"c,d\ne,f\ng,h\n', [2, 4, 5], 3, "a quote is not closed"),
        ('a,b\n"c"x,d\ne,f\n', [2, 4], 3, "broken CSV: ',' expected after '\"'"),
        ("a,b\nc,\ne,f\n", [2, 4], 3, "output is empty"),
    ],
)
def test_a_bad_row_of_a_csv_file_costs_itself(tmp_path, content, good, bad, expected):
    rows = read(tmp_path / "a.csv", "instruction,output\n" + content)
    assert lines(rows) == good
    assert [line for line, _ in rejects(rows)] == [bad]
    assert expected in rows.rejects[0].reason


def test_bytes_that_are_not_utf8_cost_their_row_and_are_named(tmp_path):
    for name, head, tail in [("a.jsonl", b"", b""), ("b.jsonl", b"\xef\xbb\xbf", b""), ("a.json", b"[", b"]")]:
        comma = b"," if tail else b""
        good, bad = '{"prompt": "好", "completion": "b"}'.encode(), '{"prompt": "好", "completion": "b"}'.encode("gbk")
        data = head + good + comma + b"\n" + bad + comma + b"\n" + good + tail
        rows = read(tmp_path / name, data)
        assert (lines(rows), len(rows.rejects), rows.rejects[0].source) == ([1, 3], 1, f"{name}:2")
        offset = len(head + good + comma) + 1 + bad.index(b"\xba")
        assert f"not UTF-8: byte 0xba at offset {offset} of the file" in rows.rejects[0].reason
        assert "iconv -f GBK -t UTF-8" in rows.rejects[0].reason
    rows = read(tmp_path / "a.csv", b"instruction,output\na,b\n" + "好,b\n".encode("gbk"))
    assert (lines(rows), rejects(rows)[0][0]) == ([2], 3)


def test_a_file_in_another_encoding_throughout_is_an_error(tmp_path):
    rows = [{"instruction": "你好", "output": "您好"}] * 3
    for name, text in [
        ("a.json", json.dumps(rows, ensure_ascii=False, indent=1)),
        ("a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("a.csv", "instruction,output\n你好,您好\n"),
    ]:
        assert "iconv -f GBK -t UTF-8" in failure(tmp_path / name, text.encode("gbk"))
    assert "header cannot be read: not UTF-8" in failure(tmp_path / "b.csv", "问题,output\na,b\n".encode("gbk"))
    assert "damaged utf-16" in failure(tmp_path / "a.json", f"[{GOOD}]".encode("utf-16")[:-1])
    assert "UTF-16 without a byte order mark" in failure(tmp_path / "a.json", f"[{GOOD}]".encode("utf-16-le"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "", "the file is empty"),
        ("a.jsonl", "\n \n", "the file is empty"),
        ("a.json", b"\xef\xbb\xbf", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.parquet", "", "the file is empty"),
        ("a.json", "[]", "there are no rows in it"),
        ("a.csv", "instruction,output\n", "there are no rows in it"),
        ("a.csv", "text,label\na,b\nc,d\n", "no recognised columns: found 'label', 'text'; expected messages, or"),
        ("a.json", '{"default": {"train": {}}}', "no recognised columns: found 'default'"),
        ("a.csv", "instruction,output,output\na,b,c\n", "the column 'output' stands twice"),
        ("a.csv", 'instruction,"output\na,b\n', "the header cannot be read: broken CSV: a quote is not closed"),
        ("a.json", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff", "binary data"),
        ("a.jsonl", bytes(100), "binary data"),
        ("a.txt", "hello", "the suffix '.txt' is not known and the content is not JSON"),
        ("a.parquet", "hello", "not a Parquet file"),
        ("a.parquet", b"PAR1 and no more", "a damaged Parquet file"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 999, mtime=0)[:-30], "cannot be read"),
        ("a.jsonl.gz", b"\x1f\x8b no gzip", "cannot be read"),
    ],
)
def test_a_file_without_usable_rows_is_an_error(tmp_path, name, content, expected):
    assert expected in failure(tmp_path / name, content)


def test_missing_files_and_folders_without_data_are_errors(tmp_path):
    assert "no such file" in failure(tmp_path / "absent.json")
    assert "found none" in failure(tmp_path)
    (tmp_path / "test.json").write_text(f"[{GOOD}]")
    assert "found only test.json; name the file" in failure(tmp_path)
    with pytest.raises(DataError, match=r"set data\.train"):
        read_rows([], DataConfig(train="x"))


def write_tree(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"[{GOOD}]")
    return [file.relative_to(folder).as_posix() for file in data_files(folder)]


def test_a_folder_stands_for_its_data_files(tmp_path):
    names = ("b.jsonl", "a.json", "README.md", "dataset_infos.json", ".cache/x.json", "script.py")
    assert write_tree(tmp_path / "plain", *names) == ["a.json", "b.jsonl"]
    names = ("data/train-00000-of-00001.json", "data/test-00000-of-00001.json", "extra.json")
    assert write_tree(tmp_path / "named", *names) == ["data/train-00000-of-00001.json"]
    assert write_tree(tmp_path / "nested", "zh/train/0.json", "zh/validation/0.json") == ["zh/train/0.json"]
    assert write_tree(tmp_path / "rest", "rows.json", "eval.json", "my_dev_set.json") == ["rows.json"]
    assert write_tree(tmp_path / "words", "constraints.json", "latest.json") == ["constraints.json", "latest.json"]
    rows = read_rows([tmp_path / "plain", tmp_path / "rest"], DataConfig(train="x"))
    assert [conversation.source for conversation in rows.conversations] == ["a.json:1", "b.jsonl:1", "rows.json:1"]


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path):
    write_tree(tmp_path, "x/a.json", "y/a.json")
    rows = read_rows([tmp_path], DataConfig(train="x"))
    assert [conversation.source for conversation in rows.conversations] == [
        f"{tmp_path}/x/a.json:1",
        f"{tmp_path}/y/a.json:1",
    ]


def test_parquet_rows_are_counted_across_row_groups_and_unused_columns_do_no_harm(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", None, "c", "d"],
            "completion": ["b"] * 4,
            "when": pa.array([1, 2, 3, 4], pa.timestamp("ns")),
            "image": [b"\xff"] * 4,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    rows = read(tmp_path / "a.parquet")
    assert lines(rows) == [1, 3, 4]
    assert rejects(rows) == [(2, "prompt is null where text belongs")]
    pq.write_table(table.drop_columns(["prompt"]), tmp_path / "b.parquet")
    assert "found 'completion', 'image', 'when'" in failure(tmp_path / "b.parquet")


def test_a_damaged_row_group_of_a_parquet_file_is_one_reject(tmp_path):
    texts = [f"{number:04d}" * 50 for number in range(2000)]
    table = pa.table({"prompt": texts, "completion": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000, compression="gzip", use_dictionary=False)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    data[start + 1500 : start + 1640] = b"\xff" * 140  # past the page's header
    rows = read(tmp_path / "a.parquet", bytes(data))
    assert (len(rows.conversations), rejects(rows)[0][0]) == (1000, 1001)
    assert "rows up to 2000 cannot be read" in rows.rejects[0].reason


def test_rejects_are_written_with_the_rows_they_were(tmp_path):
    content = f'{GOOD}\n{{"instruction": "好", "output": 3}}\n{{broken\n{SURROGATE}\n{{{ROW}: NaN}}\n'
    rows = read(tmp_path / "a.jsonl", content.encode() + '{"instruction": "好"}\n'.encode("gbk"))
    text = rejects_jsonl([*rows.rejects, Reject("b.json:1", "elsewhere")]).decode("utf-8")
    written = [json.loads(line) for line in text.splitlines()]
    assert [line["source"] for line in written] == [*(f"a.jsonl:{number}" for number in range(2, 7)), "b.json:1"]
    assert written[0] == {
        "source": "a.jsonl:2",
        "reason": "output is a number where text belongs",
        "row": {"instruction": "好", "output": 3},
    }
    assert written[1]["row"] == "{broken"
    assert written[2]["row"] == {"instruction": "a", "output": "\ud83d"}
    assert written[3]["row"] == "{'instruction': 'a', 'output': nan}"
    assert written[4]["row"].encode("utf-8", "surrogateescape") == '{"instruction": "好"}'.encode("gbk")
    assert written[5] == {"source": "b.json:1", "reason": "elsewhere"}


@pytest.mark.parametrize("inner", ["", "NaN"])
def test_rejects_are_written_from_where_the_stack_allows_less_nesting_than_reading_took(tmp_path, inner):
    def deeper(frames: int, rows: Rows) -> bytes:
        return deeper(frames - 1, rows) if frames else rejects_jsonl(rows.rejects)

    for depth in range(800, 1000, 9):
        rows = read(tmp_path / "a.jsonl", f"{{{ROW}: {'[' * depth}{inner}{']' * depth}}}\n{GOOD}\n")
        assert json.loads(deeper(100, rows).split(b', "row"')[0].strip(b"}\n") + b"}")["source"] == "a.jsonl:1"


def test_reading_imports_no_torch_transformers_or_pandas(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    code = f"""
import sys
from pathlib import Path
from lorikit.config import DataConfig
from lorikit.data.read import read_rows
read_rows([Path({str(tmp_path / "a.jsonl")!r})], DataConfig(train="x"))
print([name for name in ("torch", "transformers", "peft", "pandas", "pyarrow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
