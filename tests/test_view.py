"""What `lorikit check` shows is what will be trained, adds up, and cannot be forged by the text of a row."""

import io
import json
import re
import unicodedata
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from chat_templates import tokenizers
from lorikit.config import RunConfig
from lorikit.data.encode import Encoder
from lorikit.data.values import Conversation, Message
from lorikit.data.view import check, render, sample, visible
from lorikit.errors import ConfigError, DataError


def settings_of(evaluation=None, **data):
    return RunConfig(
        model={"name_or_path": "m"},
        data={"train": "rows.jsonl", **data},
        train={"output_dir": "runs/x"},
        eval=evaluation or {"eval_size": 0},
    )


@cache
def encoder_of(kind):
    return Encoder(tokenizers()[kind], settings_of().data)


def alpaca(question, answer):
    return {"instruction": question, "output": answer}


def checked(folder, rows, *, kind="llama3", evaluation=None, show=3, row=None, **data):
    file = folder / "rows.jsonl"
    file.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    config = settings_of(evaluation, **data)
    return check([file], config, Encoder(tokenizers()[kind], config.data), show=show, row=row)


def shown(result, width=100, **options):
    """The text that a console prints."""
    file = io.StringIO()
    render(result, Console(file=file, width=width, **options))
    return file.getvalue()


def example_of(kind, *texts):
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return encoder_of(kind).encode(Conversation(tuple(turns), "rows.jsonl:1"))[-1]


def account(text):
    """The counts of the table, by the name that stands before them."""
    return {name: int(count.replace(",", "")) for name, count in re.findall(r"^(\D+?) +([\d,]+)(?: |$)", text, re.M)}


def test_the_account_adds_up_before_the_readers_eyes(tmp_path):
    rows = [alpaca(f"question {i}", "Pip") for i in range(1200)]
    rows += [rows[0], alpaca("q", ""), alpaca("who?", "Pip " * 200)]
    text = shown(checked(tmp_path, rows, on_bad_row="skip", max_length=100, evaluation={"eval_size": 40}))
    table = account(text.split("\n\n")[0].partition("\n")[2])
    assert table.pop("= rows read") == 1203 == sum(table.values())
    assert table == {
        "trained": 1160,
        "held out": 40,
        "dropped: cannot be read": 1,
        "dropped: longer than max_length": 1,
        "duplicates removed": 1,
    }


def test_rows_that_stop_training_are_refused_and_named(tmp_path):
    result = checked(tmp_path, [alpaca("q", "a"), alpaca("q", "")])
    text = shown(result)
    assert result.refused and result.to_dict()["refusals"]
    assert "refused: cannot be read  1" in text
    assert "refused: 1 of 2 rows cannot be used:\n  rows.jsonl:2: " in text
    assert not checked(tmp_path, [alpaca("q", "a"), alpaca("q", "")], on_bad_row="skip").refused


def test_long_lists_are_cut_on_the_screen_and_complete_for_machines(tmp_path):
    result = checked(tmp_path, [alpaca("q", "a")] * 11)
    text = shown(result)
    assert "duplicates (10)" in text and "rows.jsonl:6: equals rows.jsonl:1" in text and "and 5 more" in text
    assert "rows.jsonl:7" not in text
    assert len(json.loads(json.dumps(result.to_dict()))["duplicates"]) == 10


def test_the_histogram_marks_where_max_length_cuts(tmp_path):
    rows = [alpaca(f"q{i}", "Pip " * i) for i in range(1, 40)]
    text = shown(checked(tmp_path, rows, max_length=40))
    bins = [(int(low), int(high), int(n)) for low, high, n in re.findall(r"^ *(\d+) - +(\d+) +(\d+)", text, re.M)]
    assert sum(n for *_, n in bins) == 39
    over = sum(n for low, _, n in bins if low > 40)
    assert f"max_length 40: {over} longer rows dropped ┄" in text
    before, after = text.split("max_length 40: ")
    assert re.search(r"- +40 +\d+ *█*.?\n$", before) and re.search(r"\n *41 - ", after)
    assert "no row is longer ┄" in shown(checked(tmp_path, rows))


def test_without_colour_what_is_learnt_stands_in_brackets_and_control_tokens_in_frames(tmp_path):
    text = shown(checked(tmp_path, [alpaca("who?\nyou?", "Pip,\na cat")]))
    row = text.split("learnt\n")[-1]
    assert row.startswith("  ▐<|begin_of_text|>▌▐<|start_header_id|>▌user▐<|end_header_id|>▌↵")
    assert re.search(r"^  who\?↵ *\n  you\?▐<\|eot_id\|>▌", row, re.M)
    assert re.search(r"^  ⟦Pip,↵ *\n  a cat▐<\|eot_id\|>▌⟧ *$", row, re.M)


def test_colours_replace_the_brackets_but_not_when_colours_are_unwanted(tmp_path):
    result = checked(tmp_path, [alpaca("who?", "Pip")])
    coloured = shown(result, force_terminal=True, color_system="truecolor")
    assert "⟦" not in coloured and "\x1b[1;32mPip\x1b[0m\x1b[30;42m▐<|eot_id|>▌" in coloured
    assert "\x1b[2mwho?\x1b[0m\x1b[36m▐<|eot_id|>▌" in coloured
    assert "⟦\x1b[1mPip" in shown(result, force_terminal=True, color_system="truecolor", no_color=True)


def test_a_control_token_typed_in_a_row_is_not_framed_and_frames_cannot_be_typed(tmp_path):
    text = shown(checked(tmp_path, [alpaca("say <|eot_id|> and ▐<|eot_id|>▌", "⟦no⟧ ↵ ✂")]), width=200)
    assert "say <|eot_id|> and \\u2590<|eot_id|>\\u258c▐<|eot_id|>▌" in text
    assert "⟦\\u27e6no\\u27e7 \\u21b5 \\u2702▐<|eot_id|>▌⟧" in text
    assert re.search(r"note: rows that spell a control token, kept as plain text \(1\)\n  rows\.jsonl:1 *\n", text)


def test_text_can_neither_steer_the_terminal_nor_style_the_page(tmp_path):
    text = shown(
        checked(tmp_path, [alpaca("[bold]q[/bold] [link=x]", "\x1b]0;owned\x07 \x9b2J \u202eevil \r\b \u2028 a\tb")])
    )
    assert "[bold]q[/bold] [link=x]" in text
    assert "\\x1b]0;owned\\x07 \\x9b2J \\u202eevil \\r\\x08 \\u2028 a\\tb" in text
    assert all(char == "\n" or unicodedata.category(char)[0] != "C" for char in text)


def test_a_files_name_cannot_steer_the_terminal(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    file = folder / "a\x1b[2J[red]b.jsonl"
    file.write_text(json.dumps(alpaca("q", "a")) + "\n" + json.dumps(alpaca("q", "")))
    config = settings_of()
    text = shown(check([file], config, Encoder(tokenizers()["llama3"], config.data)))
    assert "a\\x1b[2J[red]b.jsonl" in text and "\x1b" not in text


@settings(max_examples=100)
@given(st.text())
def test_visible_text_has_nothing_invisible_but_joiners(text):
    result = visible(text)
    assert all(unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp") or char in "\u200c\u200d" for char in result)
    assert visible(result) == result


def test_emoji_that_are_joined_stay_whole():
    assert visible("👩‍👩‍👧 नमस्ते é 你好") == "👩‍👩‍👧 नमस्ते é 你好"


@pytest.mark.parametrize("kind", sorted(tokenizers()))
def test_characters_of_several_tokens_are_shown_whole(kind):
    one = sample(example_of(kind, "你好吗，娘娘？🙂", "本宫很好 🙂🙂 é"), encoder_of(kind), "trained")
    learnt = "".join(span.text for span in one.spans if span.use == "learnt" and not span.control)
    assert learnt.strip() == "本宫很好 🙂🙂 é"
    assert any("你好吗，娘娘？🙂" in span.text for span in one.spans if span.use == "read")
    assert all("\ufffd" not in span.text for span in one.spans)


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(tokenizers())), st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12), st.data()
)
def test_spans_are_the_whole_text_and_every_token_once(kind, question, answer, data):
    try:
        example = example_of(kind, question, answer)
    except DataError:
        return
    encoder = encoder_of(kind)
    max_length = data.draw(st.none() | st.integers(1, len(example.input_ids)))
    one = sample(example, encoder, "trained", max_length)
    whole = encoder.tokenizer.decode(example.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(span.text for span in one.spans) == whole
    learnt = [i for i, label in enumerate(example.labels[:max_length]) if label != -100]
    assert one.num_learnt == len(learnt)
    assert one.num_tokens == len(example.input_ids)
    assert sum(span.control for span in one.spans) == sum(i in encoder.control_ids for i in example.input_ids)


def test_the_first_trained_rows_are_shown_and_as_many_as_wanted(tmp_path):
    rows = [alpaca("q", "x " * 300), *[alpaca(f"q{i}", "a") for i in range(9)]]
    assert [one.source for one in checked(tmp_path, rows, max_length=90).samples] == [
        "rows.jsonl:2",
        "rows.jsonl:3",
        "rows.jsonl:4",
    ]
    assert len(checked(tmp_path, rows, show=5).samples) == 5
    assert checked(tmp_path, rows, show=0).samples == []


@pytest.mark.parametrize(
    ("line", "fate"),
    [
        (1, "trained"),
        (2, "removed, equal to rows.jsonl:1"),
        (3, "dropped: output is empty"),
        (5, "dropped: holds the character U+10FFFD"),
    ],
)
def test_any_row_can_be_shown_with_what_became_of_it(tmp_path, line, fate):
    rows = [alpaca("q", "a"), alpaca("q", "a"), alpaca("q", ""), alpaca("q", "x " * 300), alpaca("q", "\U0010fffd")]
    result = checked(tmp_path, rows, row=f"rows.jsonl:{line}", on_bad_row="skip", max_length=90)
    assert [one.source for one in result.samples] == [f"rows.jsonl:{line}"]
    assert result.samples[0].fate.startswith(fate)
    assert f"rows.jsonl:{line}  {fate}" in shown(result)


def test_a_row_over_max_length_is_shown_to_its_end_with_the_cut(tmp_path):
    rows = [alpaca("q", "a"), alpaca("q", "one two three " * 20)]
    dropped = checked(tmp_path, rows, row="rows.jsonl:2", max_length=60)
    one = dropped.samples[0]
    assert one.fate == f"dropped: {one.num_tokens} tokens, over 60"
    assert shown(dropped).count("✂") == 2 and "✂ end of max_length" in shown(dropped)
    cut = checked(tmp_path, rows, row="rows.jsonl:2", max_length=60, on_long_row="truncate").samples[0]
    assert cut.fate == "trained, cut to 60"
    assert cut.spans == one.spans and cut.num_learnt < 60


def test_every_line_of_a_row_names_it(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([alpaca("q", "a"), alpaca("w", "b")], indent=2))
    config = settings_of()
    encoder = Encoder(tokenizers()["llama3"], config.data)
    second = file.read_text().splitlines().index('    "instruction": "w",') + 1
    first = {check([file], config, encoder, row=f"rows.json:{line}").samples[0].source for line in range(2, second - 1)}
    later = {check([file], config, encoder, row=row).samples[0].source for row in (f"{second}", f"{file}:{second + 1}")}
    assert first == {"rows.json:2"} and later == {f"rows.json:{second - 1}"}


def test_a_line_without_its_file_is_refused_where_there_are_several(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(alpaca("q", name)) + "\n")
    config = settings_of()
    encoder = Encoder(tokenizers()["llama3"], config.data)
    with pytest.raises(ConfigError, match="give file:line"):
        check([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], config, encoder, row="1")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("rows.jsonl", "give file:line, as in rows.jsonl:1"),
        ("other.jsonl:1", "the rows are from rows.jsonl"),
        ("rows.jsonl:0", "the first row is rows.jsonl:1"),
        ("rows.jsonl:-1", "give file:line"),
        ("", "give file:line"),
    ],
)
def test_a_row_that_is_not_there_is_a_mistake_in_the_call(tmp_path, row, problem):
    with pytest.raises(ConfigError, match=problem):
        checked(tmp_path, [alpaca("q", "a")], row=row)


def test_each_example_of_a_row_is_shown(tmp_path):
    turns = [("user", "two and two?"), ("assistant", "4"), ("user", "and two?"), ("assistant", "6")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    row["messages"][1]["reasoning_content"] = "easy"
    samples = checked(tmp_path, [row], kind="qwen3").samples
    assert [one.fate for one in samples] == ["trained (1 of 2)", "trained (2 of 2)"]


def test_a_very_long_text_is_shortened_unless_its_row_was_asked_for(tmp_path):
    rows = [alpaca("q", "word " * 1000), alpaca("w", "a")]
    text = shown(checked(tmp_path, rows, max_length=9000))
    assert re.search(r"… 4,399\s+more\s+characters\s+…", text)
    assert "more characters" not in shown(checked(tmp_path, rows, max_length=9000, row="1"))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    rows = [alpaca(f"q{i}", "你好 hello " * i) for i in range(1, 40)]
    from rich.cells import cell_len

    text = shown(checked(tmp_path, rows, max_length=100), width=width)
    assert max(map(cell_len, text.splitlines())) <= width


def test_machines_get_the_samples_as_they_are(tmp_path):
    result = checked(tmp_path, [alpaca("q", "\x1b[1m⟦x⟧")])
    spans = json.loads(json.dumps(result.to_dict()))["samples"][0]["spans"]
    assert {"text": "\x1b[1m⟦x⟧", "use": "learnt", "control": False} in spans
    assert {"text": "<|eot_id|>", "use": "learnt", "control": True} in spans


def test_clean_data_has_one_line_of_findings_and_dirty_data_says_what_to_do(tmp_path):
    rows = [alpaca(f"question {i}", f"answer {i}") for i in range(9)]
    assert "\n\nfindings: none\n\n" in shown(checked(tmp_path, rows))
    text = shown(
        checked(
            tmp_path, [*rows, rows[0], alpaca("question 1", "zero\u200bwidth"), alpaca("mine?", "AKIAJ5Q7ZK3LMNPQR2ST")]
        )
    )
    assert "findings: 1 error, 2 warnings, 1 note" in text
    assert text.index("error: keys or passwords") < text.index("warning: rows whose prompt") < text.index("note: dupl")
    assert "rows.jsonl:11: zero-width character U+200B" in text and "→ lorikit check --fix OUT writes" in text
    assert "AKIA… (20 characters)" in text


def test_a_row_of_a_file_in_one_line_is_shown_by_its_number(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([alpaca(f"question {n}?", f"answer {n}") for n in range(5)] + [alpaca("again", "")]))
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": str(file), "on_bad_row": "skip"},
            "train": {"output_dir": "o"},
        }
    )
    encoder = Encoder(tokenizers()["llama3"], config.data)

    def shown_of(row):
        return check([file], config, encoder, row=row).samples[0]

    third = shown_of("rows.json:1 row 3")
    assert third.source == "rows.json:1 row 3" and "answer 2" in "".join(span.text for span in third.spans)
    assert shown_of("1 row 3") == third
    assert shown_of("rows.json:1").source == "rows.json:1 row 1"
    assert "empty" in shown_of("1 row 6").fate
    assert check([file], config, encoder).report.dropped["unreadable"][0].source == "rows.json:1 row 6"
