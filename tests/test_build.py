"""Rows come from what people have, and every line of it has a fate."""

import json
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.config import DataConfig, load_config
from lorikit.data.build import build, read_materials, run_yaml, speakers
from lorikit.data.faq import read_faq
from lorikit.data.fix import rows_as_file
from lorikit.data.read import read_rows
from lorikit.data.records import Reading, parse_time, read_records
from lorikit.data.scripts import name_and_text, read_script, without_directions
from lorikit.errors import ConfigError, DataError
from tiny_model import save_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "build"


def built(path, *roles, context=0, kind="auto", **columns):
    return build(read_materials([path], Reading(columns), kind), roles, context)


def of_text(folder, text, *roles, name="play.txt", **options):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return built(path, *roles, **options)


def pairs(result):
    return [(row["instruction"], row["output"]) for row in result.rows]


# Scripts


def test_the_english_play_gives_tams_answers_without_directions():
    result = built(EXAMPLES / "lighthouse.txt", "Old Tam")
    assert pairs(result) == [
        (
            "Is this how it is every evening?",
            "Every evening, and twice when it storms.\nYou get used to the second time.",
        ),
        ("And who taught you all this?", "The lamp did. It complains when you do it wrong."),
        ("Kraah!", "That was not the lamp."),
        (
            "You said the ferry leaves at six.\nIt is half past.",
            "It leaves at six. I did not say which of us would be on it.",
        ),
        ("Then when do you sail?", "When the tea is finished.\nNow."),
    ]
    assert result.rows[0]["source"] == "lighthouse.txt:11"
    (material,) = result.materials
    assert list(material.fates) == list(range(1, 36))
    where = {fate: [n for n, one in material.fates.items() if one == fate] for fate in material.counts()}
    assert where["nothing before it"] == [23] and where["narration"] == [33] and where["before the first"] == [4]
    assert where["direction"] == [12] and where["heading"] == [1, 2, 6, 8, 21, 35]
    assert where["other speaker"] == [17, 27]


def test_the_chinese_play_gives_lao_zhous_answers():
    result = built(EXAMPLES / "teahouse.txt", "老周")
    assert pairs(result)[:2] == [
        ("师傅，今天还会有人来吗？", "下雨天，总会有一个人来躲雨。"),
        ("要是没有人呢？", "那我们就自己喝。好茶不等人。"),
    ]
    assert ("浓的。", "浓茶解乏，淡茶解愁。\n您看着可不像是累了。") in pairs(result)
    assert ("茶钱多少？", "雨钱我收不得，茶钱您随意。") in pairs(result)


def test_context_keeps_earlier_turns_of_the_scene_as_history():
    rows = built(EXAMPLES / "lighthouse.txt", "OLD TAM", context=4).rows
    assert rows[2]["instruction"] == "I cannot hear anything.\nKraah!"
    assert rows[2]["history"] == [
        ["And who taught you all this?", "The lamp did. It complains when you do it wrong."],
    ]
    assert "history" not in rows[0] and "history" not in rows[3]


def test_a_question_never_comes_from_another_scene(tmp_path):
    text = "ANN: Last words.\n\nSCENE 2\n\nBOB: First words.\nANN: Yes?\nBOB: Yes."
    result = of_text(tmp_path, text, "BOB", context=9)
    assert pairs(result) == [("Yes?", "Yes.")]
    assert result.materials[0].fates == {
        1: "other speaker", 2: "blank", 3: "heading", 4: "blank", 5: "nothing before it", 6: "question", 7: "answer",
    }  # fmt: skip


def test_one_person_of_two_names_is_asked_and_answers_as_one(tmp_path):
    result = of_text(tmp_path, "ANN: Well?\nBOB: One.\nROBERT: Two.\nANN: And?\nRobert: Three.", "bob", "ROBERT")
    assert pairs(result) == [("Well?", "One.\nTwo."), ("And?", "Three.")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("MIRA: Hello", ("MIRA", "Hello")),
        ("Mr. Hart: Hello: you", ("Mr. Hart", "Hello: you")),
        ("甄嬛（笑）：你好", ("甄嬛", "你好")),
        ("【老周】：请", ("老周", "请")),
        ("**Mira:** Hi", ("Mira", "Hi")),
        ("MIRA (aside): Hi", ("MIRA", "Hi")),
        ("Ｍｉｒａ：Hi", ("Mira", "Hi")),
        ("see https://x.org", None),
        ("10:30 they left", None),
        ("He thought about it, and said: no", None),
        ("This is a long clause of words: no", None),
        ("no colon", None),
        ("MI\x1b[1mRA: Hi", None),
    ],
)
def test_names_are_told_from_sentences_with_a_colon(line, found):
    assert name_and_text(line) == found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("(sighs) Well. (pause) Yes", "Well. Yes"),
        ("I [aside] know", "I know"),
        ("好（停顿）的。", "好的。"),
        ("*laughs* Sure, 2*3*4 is 24", "Sure, 2*3*4 is 24"),
        ("(a (b) c) d", "d"),
        ("an open (bracket", "an open (bracket"),
        ("(all of it)", ""),
    ],
)
def test_directions_are_cut_and_nothing_else(text, left):
    assert without_directions(text) == left


def test_a_direction_over_several_lines_is_no_speech(tmp_path):
    text = "ANN: Who?\n(He looks\nat her\nfor long.)\nBOB: (bows\nlow)\nANN: Who are you?\nBOB: Me."
    result = of_text(tmp_path, text, "BOB")
    assert pairs(result) == [("Who?\nWho are you?", "Me.")]
    assert [n for n, fate in result.materials[0].fates.items() if fate == "direction"] == [2, 3, 4, 5, 6]


def test_who_speaks_how_often_is_listed_under_the_usual_spelling():
    who = speakers(read_materials([EXAMPLES / "lighthouse.txt"], Reading({})))
    assert [(one.name, one.turns, one.lines) for one in who] == [("OLD TAM", 6, 9), ("MIRA", 5, 6), ("A GULL", 2, 2)]


script_lines = st.lists(
    st.one_of(
        st.sampled_from(
            ["", "ANN: hello", "BOB：你好", "(bows", "low)", "SCENE 2", "BOB: (bows)", "goes on", "***", "[x]", "A:"]
        ),
        st.text(max_size=20).filter(lambda text: "\n" not in text),
    ),
    max_size=25,
)


@settings(max_examples=150)
@given(script_lines)
def test_every_line_of_a_script_has_one_fate_and_every_turn_a_text(lines):
    material = read_script(lines, "play.txt")
    assert sorted(material.fates) == list(range(1, len(lines) + 1))
    said = [one for scene in material.scenes for one in scene]
    assert all(one.text.strip() and one.lines for one in said)
    numbers = [number for one in said for number in one.lines]
    assert len(numbers) == len(set(numbers)) and all(material.fates[n] == "other speaker" for n in numbers)
    for scene in material.scenes:
        assert all(a.speaker.casefold() != b.speaker.casefold() for a, b in pairwise(scene))


@settings(max_examples=100)
@given(script_lines, st.integers(0, 5))
def test_built_rows_alternate_and_the_reader_takes_them(lines, context):
    material = read_script(lines, "play.txt")
    try:
        result = build([material], ["ANN"], context)
    except (ConfigError, DataError):
        return
    for row in result.rows:
        assert all(len(pair) == 2 and all(pair) for pair in row.get("history", []))
        assert row["instruction"].strip() and row["output"].strip()
    assert sorted(material.fates) == list(range(1, len(lines) + 1))


# Chats


def test_the_chat_joins_messages_and_ends_conversations_at_long_silences():
    result = built(EXAMPLES / "chat.jsonl", "Bruno", context=2)
    assert pairs(result)[0][1] == "Every Sunday from seven.\nThe rye is gone by eight, so come early."
    assert result.rows[1]["history"][0][0] == "Morning! Is the bakery open on Sundays?"
    assert result.materials[0].counts() == {
        "answer": 4,
        "question": 3,
        "nothing before it": 1,
        "no speaker": 1,
        "no text": 1,
    }


def test_columns_of_a_chat_may_be_named_and_nested_as_exports_do(tmp_path):
    export = {"name": "g", "messages": [
        {"author": {"name": "Ann"}, "content": ["Is ", {"text": "this"}, " it?"], "timestamp": "2026-01-01T10:00:00Z"},
        {"author": {"name": "Bob"}, "content": "It is.", "timestamp": "2026-01-01T10:01:00Z"},
    ]}  # fmt: skip
    (tmp_path / "discord.json").write_text(json.dumps(export))
    assert pairs(built(tmp_path / "discord.json", "Bob")) == [("Is this it?", "It is.")]
    (tmp_path / "odd.csv").write_text("wer;was\nAnn;Na?\nBob;Ja.\n")
    assert pairs(built(tmp_path / "odd.csv", "Bob", speaker="wer", text="was")) == [("Na?", "Ja.")]
    with pytest.raises(DataError, match=r"no columns for a question and its answer.*found 'wer', 'was'"):
        built(tmp_path / "odd.csv", "Bob")
    with pytest.raises(ConfigError, match="no column for text 'what'; the columns are 'wer', 'was'"):
        built(tmp_path / "odd.csv", "Bob", speaker="wer", text="what")


def test_a_chat_with_the_newest_message_first_is_read_backwards(tmp_path):
    rows = [
        {"from": "Bob", "text": "Fine.", "date": "2026-01-01 10:01"},
        {"from": "Ann", "text": "How?", "date": "2026-01-01 10:00"},
    ]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    result = built(tmp_path / "c.json", "Bob")
    assert pairs(result) == [("How?", "Fine.")] and "newest" in result.materials[0].notes[0]


def test_times_are_read_in_common_forms():
    assert (
        parse_time("2026-01-01T00:00:00+00:00") == parse_time(1767225600) == parse_time("1767225600000") == 1767225600
    )
    assert parse_time("01.01.2026, 00:00") == parse_time("2026/01/01 00:00") == 1767225600
    assert parse_time("soon") is None and parse_time(None) is None


# Tables


def test_the_table_gives_its_full_records():
    result = built(EXAMPLES / "library.csv")
    assert pairs(result)[2] == ("Is there a quiet room?", 'Upstairs, to the left. Ask for the key, "the brass one".')
    assert result.materials[0].counts() == {"answer": 3, "no answer": 1, "no question": 1}


def test_a_sheet_of_a_workbook_is_a_table(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["frage", "antwort"])
    book.active.append(["Wie viele?", 7.0])
    book.create_sheet("more").append(["Question", "Answer"])
    book["more"].append(["Q1", "A1"])
    book.save(tmp_path / "t.xlsx")
    assert pairs(built(tmp_path / "t.xlsx")) == [("Wie viele?", "7")]
    more = read_records(tmp_path / "t.xlsx", "t.xlsx", Reading({}, sheet="more"))
    assert [(pair.question, pair.answer) for pair in more.pairs] == [("Q1", "A1")]
    with pytest.raises(ConfigError, match="no sheet 'x'; there are 'Sheet', 'more'"):
        read_records(tmp_path / "t.xlsx", "t.xlsx", Reading({}, sheet="x"))
    stale = tmp_path / "stale.xlsx"
    with zipfile.ZipFile(tmp_path / "t.xlsx") as old, zipfile.ZipFile(stale, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'<dimension ref="A1:B2"', b'<dimension ref="A1:B1"'))
        assert old.read("xl/worksheets/sheet1.xml") != new.read("xl/worksheets/sheet1.xml")
    assert pairs(built(stale)) == [("Wie viele?", "7")], "what the writer noted of the size is not believed"
    with zipfile.ZipFile(tmp_path / "t.xlsx") as old, zipfile.ZipFile(tmp_path / "cut.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 200 if "sheet1" in name else None])
    with pytest.raises(DataError, match="its sheet cannot be read to the end"):
        built(tmp_path / "cut.xlsx")
    (tmp_path / "bad.xlsx").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="not a workbook"):
        built(tmp_path / "bad.xlsx")


def test_broken_records_are_counted_with_their_reasons(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"question": "a", "answer": "b"}\n{broken\n{"question": "c", "answer": null}\n')
    material = built(tmp_path / "t.jsonl").materials[0]
    assert material.fates == {1: "answer", 2: "cannot be read", 3: "no answer"} and "broken JSON" in material.reasons[2]


# FAQs


def test_what_no_file_can_hold_is_counted_and_missing_numbers_are_no_answers(tmp_path):
    file = tmp_path / "table.jsonl"
    file.write_text(
        '{"question": "a", "answer": "b\\ud83d"}\n{"question": "a", "answer": ["x", {"text": "y\\u0000"}]}\n{}\n'
        '{"question": "a", "answer": NaN}\n{"question": Infinity, "answer": "b"}\n{"question": "a", "answer": 1.50}\n'
    )
    result = built(file)
    assert pairs(result) == [("a", "1.5")]
    (material,) = read_materials([file], Reading({}))
    assert material.counts() == {"cannot be read": 3, "no answer": 1, "no question": 1, "answer": 1}
    assert "half a character" in material.reasons[1] and "NUL" in material.reasons[2]
    rows_as_file(result.rows, tmp_path / "rows.json").decode()
    with pytest.raises(DataError, match="named columns"):
        built(_written(tmp_path / "empty.json", "{}"))


def test_byte_order_marks_between_joined_texts_belong_to_no_name(tmp_path):
    file = _written(tmp_path / "play.txt", "\ufeffANN: Who is there?\n\ufeffBOB: Nobody.\n")
    assert pairs(built(file, "BOB")) == [("Who is there?", "Nobody.")]


def _written(file, text):
    file.write_text(text, encoding="utf-8")
    return file


def test_the_faq_gives_headings_and_bold_lines_with_their_text():
    result = built(EXAMPLES / "bike_repair.md")
    assert [question for question, _ in pairs(result)] == [
        "How long does a repair take?",
        "Do I need an appointment?",
        "What does a new chain cost?",
        "Can I borrow tools?",
    ]
    assert "- Monday to Friday" in pairs(result)[0][1] and "# deposit\ntorque wrench" in pairs(result)[3][1]
    assert result.materials[0].counts() == {
        "answer": 12,
        "blank": 11,
        "question": 4,
        "heading": 3,
        "before the first": 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        "Q: Who?\nA: Pip.\n\nQ: Where?\nHere or there?\nA: There.\nOr so.",
        "**Q:** Who?\n**A:** Pip.\n\n**Q: Where?\nHere or there?**\n**A:** There.\nOr so.",
        "问：Who?\n答：Pip.\n问：Where?\nHere or there?\n答：There.\nOr so.",
        "Q1: Who?\nA1: Pip.\n## Places\nQ2: Where?\nHere or there?\nA2: There.\nOr so.",
    ],
)
def test_marked_questions_and_answers_are_read_in_several_forms(tmp_path, text):
    found = pairs(of_text(tmp_path, text, name="faq.txt"))
    assert [(q.replace("**", ""), a) for q, a in found] == [
        ("Who?", "Pip."),
        ("Where?\nHere or there?", "There.\nOr so."),
    ]


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                ["", "# T", "## What?", "### Sub", "**Bold?**", "Q: a", "A: b", "text", "```", "---", "问：x"]
            ),
            st.text(max_size=12).filter(lambda text: "\n" not in text),
        ),
        max_size=25,
    )
)
def test_every_line_of_a_faq_has_one_fate_and_every_pair_two_sides(lines):
    material = read_faq(lines, "faq.md")
    assert sorted(material.fates) == list(range(1, len(lines) + 1))
    assert all(pair.question.strip() and pair.answer.strip() for pair in material.pairs)
    assert len(material.pairs) <= list(material.fates.values()).count("question")


def test_people_called_q_and_a_speak_where_a_role_is_named(tmp_path, lorikit):
    (tmp_path / "x.txt").write_text("Q: Who?\nA: Pip.\nB: No.\nA: Yes.")
    assert [row["instruction"] for row in json.loads(lorikit("build", tmp_path / "x.txt", "--json")[1])["preview"]] == [
        "Who?"
    ]
    code, out, _ = lorikit("build", tmp_path / "x.txt", "--role", "A", "--json")
    assert code == 0 and json.loads(out)["preview"][1] == {
        "instruction": "No.", "input": "", "output": "Yes.", "source": "x.txt:4",
    }  # fmt: skip


def test_a_folder_stands_for_all_that_can_be_read_in_it(lorikit, tmp_path):
    code, out, _ = lorikit("build", EXAMPLES, "--role", "OLD TAM", "--role", "老周", "--json")
    files = {file["file"]: file["kind"] for file in json.loads(out)["files"]}
    assert code == 0 and files == {
        "bike_repair.md": "faq", "chat.jsonl": "chat", "library.csv": "table", "lighthouse.txt": "script",
        "teahouse.txt": "script",
    }  # fmt: skip
    assert lorikit("build", tmp_path)[0] == 3


# Mistakes, and the whole way


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("甄嬛：你好".encode("gbk"), "not UTF-8: byte 0xd5 at offset 0 of the file; convert the file.*iconv -f GBK"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"\x00\x01\x02\xff", "binary data"),
        (b"ANN: a\x00b", ":1: holds a NUL"),
        (b"just prose.\nmore of it.", "no line `NAME: text`"),
    ],
)
def test_files_that_hold_nothing_usable_say_why(tmp_path, data, problem):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(DataError, match=problem):
        built(tmp_path / "x.txt", "ANN")


def test_utf16_with_a_mark_and_line_ends_of_all_systems_are_read(tmp_path):
    (tmp_path / "x.txt").write_bytes("ANN: Who?\r\nBOB: 我\r\n".encode("utf-16"))
    assert pairs(built(tmp_path / "x.txt", "BOB")) == [("Who?", "我")]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfANN: Who?\rBOB: me")
    assert pairs(built(tmp_path / "x.txt", "BOB")) == [("Who?", "me")]


def test_written_rows_are_read_as_what_they_say(tmp_path, lorikit):
    code, out, err = lorikit(
        "build", EXAMPLES / "lighthouse.txt", "--role", "OLD TAM", "--context", 4, "-o", tmp_path / "r.json"
    )
    assert code == 0 and "5 rows" in out and "rows" in err
    rows = read_rows([tmp_path / "r.json"], DataConfig(train="r.json"))
    assert not rows.rejects and [len(row.messages) for row in rows.conversations] == [2, 4, 4, 2, 4]


def test_an_output_that_exists_is_left_alone_without_force(tmp_path, lorikit):
    out = tmp_path / "rows.jsonl"
    out.write_text("mine")
    command = ["build", EXAMPLES / "library.csv", "-o", out]
    code, _, err = lorikit(*command)
    assert code == 2 and "exists" in err and "--force" in err and out.read_text() == "mine"
    assert lorikit(*command, "--force")[0] == 0 and len(out.read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.txt"], 3, "no such file"),
        ([EXAMPLES / "lighthouse.txt"], 2, "--role NAME; the speakers are OLD TAM (6)"),
        ([EXAMPLES / "lighthouse.txt", "--role", "Mirra"], 2, "did you mean MIRA?"),
        ([EXAMPLES / "library.csv", "--role", "x"], 2, "nobody speaks"),
        ([EXAMPLES / "library.csv", "--kind", "poem"], 2, "script, chat, table, faq"),
        ([EXAMPLES / "library.csv", "--kind", "script"], 2, "is for text"),
        ([EXAMPLES / "library.csv", "--config", "run.yaml"], 2, "--config needs -o"),
        ([EXAMPLES / "library.csv", "-o", "rows.xml"], 2, ".json, .jsonl"),
        ([EXAMPLES / "lighthouse.txt", "--role", "MIRA", "--context", "-1"], 2, "--context is -1"),
    ],
)
def test_mistakes_are_one_line_with_the_documented_code(lorikit, arguments, code, said):
    got, out, err = lorikit("build", *arguments)
    assert (got, out) == (code, "") and said in err and err.count("\n") == 1


def test_machines_get_every_line_and_nothing_else(lorikit):
    code, out, _ = lorikit("build", EXAMPLES / "teahouse.txt", "--role", "老周", "--json")
    result = json.loads(out)
    (file,) = result["files"]
    assert code == 0 and result["rows"] == 6 and sum(file["fates"].values()) == file["lines"] == 30
    assert sorted(n for numbers in file["where"].values() for n in numbers) == list(range(1, 31))
    assert json.loads(lorikit("build", EXAMPLES / "teahouse.txt", "--list-roles", "--json")[1])[0]["name"] == "老周"


def test_the_settings_that_are_written_train(tmp_path, lorikit, monkeypatch):
    model = save_model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    code, _, err = lorikit(
        "build", EXAMPLES / "bike_repair.md", "-o", "rows.json", "--config", "run.yaml", "--model", model
    )
    assert code == 0 and "lorikit train run.yaml" in err
    assert load_config("run.yaml").train.output_dir == "runs/rows"
    code, _, err = lorikit("train", "run.yaml", "--train.max_steps", 1, "--no-compare")
    assert code == 0 and (tmp_path / "runs" / "rows" / "adapter").is_dir(), err
    assert yaml.safe_load(run_yaml(Path("a b.json"), "m"))["train"]["output_dir"] == "runs/a b"
