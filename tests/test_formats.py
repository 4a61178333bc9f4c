"""Rows of every known layout become the same conversations, and those that say something unclear are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.config import DataConfig
from lorikit.data.formats import NoColumnsError, converter, find_layout, known_columns
from lorikit.data.lines import RowError
from lorikit.data.values import Conversation, Message
from lorikit.errors import ConfigError

USER, ANSWER = Message("user", "Who are you?"), Message("assistant", "A parrot.")


def config(**settings_: object) -> DataConfig:
    return DataConfig.model_validate({"train": "rows.json", **settings_})


def read(row: object, **settings_: object) -> list[Message]:
    conversation = converter(config(**settings_))(row, "rows.json:1")
    assert conversation == Conversation(conversation.messages, "rows.json:1")
    return list(conversation.messages)


def reason(row: object, **settings_: object) -> str:
    with pytest.raises(RowError) as error:
        read(row, **settings_)
    assert "\n" not in str(error.value)
    return str(error.value)


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"{role} speaks"} for role in roles]}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Who are you?", "output": "A parrot."},
        {"instruction": "Who are you?", "input": "", "output": "A parrot.", "system": "", "history": []},
        {"instruction": "Who are you?", "input": None, "output": "A parrot.", "system": None, "history": None},
        {"instruction": "Who are you?", "context": "", "response": "A parrot."},
        {"question": "Who are you?", "answer": "A parrot."},
        {"query": "Who are you?", "response": "A parrot.", "id": 7},
        {"input": "Who are you?", "output": "A parrot."},
        {"prompt": "Who are you?", "completion": "A parrot."},
        {"prompt": "Who are you?", "response": "A parrot."},
        {"prompt": [{"role": "user", "content": "Who are you?"}], "completion": "A parrot."},
        {"prompt": "Who are you?", "completion": [{"role": "assistant", "content": "A parrot."}]},
        {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A parrot."}]},
        {"conversation": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A parrot."}]},
        {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A parrot."}]},
        {"messages": '[{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A parrot."}]'},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]},
                {"role": "assistant", "content": "A parrot.", "name": None, "reasoning_content": None, "weight": 1},
            ]
        },
    ],
)
def test_every_layout_is_recognised_by_its_columns(row):
    assert read(row) == [USER, ANSWER]


def test_own_names_win_over_synonyms_and_messages_over_flat_columns():
    row = {"prompt": "Who are you?", "completion": "A parrot.", "question": "x", "answer": "y"}
    assert read(row) == [USER, ANSWER]
    assert read({"prompt": "x", "completion": "y", **turns("user", "assistant")})[0].content == "user speaks"
    assert read(row, format="alpaca")[0].content == "x"


def test_a_context_column_is_part_of_the_prompt():
    row = {"question": "Who?", "context": "A lorikeet sits there.", "answer": "It."}
    assert read(row)[0].content == "Who?\nA lorikeet sits there."
    assert read({"instruction": "Who?", "context": "There.", "output": "It."})[0].content == "Who?\nThere."


@pytest.mark.parametrize(
    ("settings_", "prompt"),
    [
        ({}, "Translate\nhello"),
        ({"template": "tutorial"}, "Translatehello"),
        ({"template": "tutorial", "input_separator": " "}, "Translate hello"),
        ({"input_separator": "\n\n"}, "Translate\n\nhello"),
        ({"input_separator": ""}, "Translatehello"),
    ],
)
def test_instruction_and_input_are_joined_by_the_separator(settings_, prompt):
    assert read({"instruction": "Translate", "input": "hello", "output": "salut"}, **settings_)[0].content == prompt


def test_the_separator_stands_only_between_two_texts():
    assert read({"instruction": "hello", "input": "", "output": "x"})[0].content == "hello"
    assert read({"instruction": "", "input": "hello", "output": "x"})[0].content == "hello"


def test_a_history_comes_before_the_instruction():
    row = {"instruction": "Third", "output": "3", "history": [["First", "1"], ["Second", "2"]], "system": "Count."}
    contents = [(message.role, message.content) for message in read(row)]
    assert contents == [
        ("system", "Count."),
        ("user", "First"),
        ("assistant", "1"),
        ("user", "Second"),
        ("assistant", "2"),
        ("user", "Third"),
        ("assistant", "3"),
    ]


def test_a_row_without_a_system_prompt_gets_the_one_of_the_settings():
    own = {"instruction": "a", "output": "b", "system": "mine"}
    assert read({"instruction": "a", "output": "b"}, system="theirs")[0] == Message("system", "theirs")
    assert read(own, system="theirs")[0] == Message("system", "mine")
    assert read(turns("system", "user", "assistant"), system="theirs")[0].content == "system speaks"
    assert read({**turns("user", "assistant"), "system": "mine"})[0] == Message("system", "mine")
    assert "two system prompts" in reason({**turns("system", "user", "assistant"), "system": "mine"})


def test_an_empty_system_turn_is_a_choice_and_stays():
    row = {"messages": [{"role": "system", "content": ""}, *turns("user", "assistant")["messages"]]}
    assert read(row, system="theirs")[0] == Message("system", "")


def test_columns_are_mapped_by_the_setting():
    mapped = {"instruction": "ask", "output": "reply"}
    assert read({"ask": "Who are you?", "reply": "A parrot."}, columns=mapped) == [USER, ANSWER]
    assert (
        read({"dialog": turns("user", "assistant")["messages"]}, columns={"messages": "dialog"})[1].role == "assistant"
    )
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read({"prompt": "A parrot.", "completion": "Who are you?"}, columns=swapped) == [USER, ANSWER]


def test_a_column_that_is_mapped_is_not_used_a_second_time():
    row = {"input": "Who are you?", "output": "A parrot."}
    assert read(row, columns={"instruction": "input"}) == [USER, ANSWER]


def test_a_mapping_that_fits_no_format_is_refused():
    with pytest.raises(ConfigError, match="question, which no format has together; the columns are messages: messages"):
        known_columns(config(columns={"question": "instruction"}))
    with pytest.raises(ConfigError, match="no format has together"):
        known_columns(config(columns={"prompt": "p"}, format="alpaca"))
    with pytest.raises(ConfigError, match="two meanings"):
        known_columns(config(columns={"prompt": "text", "completion": "text"}))


def test_unknown_columns_are_listed_with_those_expected():
    with pytest.raises(NoColumnsError) as error:
        find_layout(["text", "label"], config())
    assert "found 'label', 'text'; expected messages, or conversations, or instruction and output" in str(error.value)
    assert "data.columns" in str(error.value)
    with pytest.raises(NoColumnsError, match="expected ask and output"):
        find_layout(["prompt", "completion"], config(columns={"instruction": "ask"}))


def test_thinking_is_split_from_the_answer_and_user_text_is_not_touched():
    answer = "<think>\nIt has feathers.\n</think>\n\nA parrot.\n"
    row = {"instruction": "<think>\nx</think>", "output": answer}
    assert read(row) == [
        Message("user", "<think>\nx</think>"),
        Message("assistant", "A parrot.\n", reasoning="It has feathers."),
    ]
    assert read({"prompt": "a", "completion": "<think>\n\n</think>\n\nb"})[1] == Message("assistant", "b", reasoning="")
    assert read({"prompt": "a", "completion": "<think> never closed"})[1].content == "<think> never closed"
    assert read({"prompt": "a", "completion": "so <think>x</think>"})[1].reasoning is None
    assert "empty" in reason({"prompt": "a", "completion": "<think>x</think>\n"})


def test_reasoning_content_and_names_are_kept():
    row = turns("user", "assistant")
    row["messages"][0]["name"] = "ada"
    row["messages"][1]["reasoning_content"] = "easy"
    assert read(row) == [
        Message("user", "user speaks", name="ada"),
        Message("assistant", "assistant speaks", reasoning="easy"),
    ]
    row["messages"][1]["content"] = "<think>x</think>y"
    assert "stands twice" in reason(row)


def test_whitespace_in_contents_is_kept():
    assert [m.content for m in read({"prompt": " a\n", "completion": "\tb "})] == [" a\n", "\tb "]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (float("nan"), "NaN"),
        (3, "a number"),
        (2.5, "a number"),
        (True, "true or false"),
        (["x"], "a list"),
        ({"a": 1}, "an object"),
        (b"x", "bytes"),
    ],
)
def test_what_is_not_text_is_refused_and_not_converted(value, kind):
    assert reason({"instruction": "a", "output": value}) == f"output is {kind} where text belongs"
    assert kind in reason({"question": value, "answer": "b"})
    turn = {"role": "user", "content": value}
    assert reason({"messages": [turn]}).startswith("turn 1 (user)")
    if value is not None:
        assert "text belongs" in reason({"instruction": "a", "input": value, "output": "b"})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": " \n\u3000"}, "output is empty"),
        ({"instruction": " ", "input": "", "output": "b"}, "the prompt is empty"),
        ({"question": "a", "answer": ""}, "answer is empty"),
        (["a", "b"], "the row is a list where an object"),
        (None, "the row is null"),
        ({"messages": []}, "no turns"),
        ({"messages": None}, "messages is null where a list belongs"),
        ({"messages": "hello"}, "messages is text, and not a list"),
        ({"messages": ["hello"]}, "turn 1 is text where an object"),
        ({"messages": [{"content": "x"}]}, "turn 1: the role is null; allowed: system, user"),
        ({"messages": [{"role": 1, "content": "x"}]}, "the role is a number"),
        (turns("user", "tool"), "turn 2: unknown role 'tool'; allowed: system, user, human, assistant, gpt"),
        (turns("function"), "unknown role 'function'"),
        (turns("user", "assistant", "assistant"), "turns 2 and 3 are both assistant"),
        (turns("user", "user", "assistant"), "turns 1 and 2 are both user"),
        (turns("user"), "the last turn is a user turn"),
        (turns("system"), "the last turn is a system turn"),
        (turns("user", "assistant", "user"), "the last turn is a user turn"),
        (turns("assistant", "user", "assistant"), "turn 1, the first"),
        (turns("system", "assistant"), "turn 2, the first"),
        (turns("user", "system", "assistant"), "turn 2 is a system turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type 'text'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "parts of type 'text'"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls cannot"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "name is a number"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history 1 is a list where a pair"),
        ({"instruction": "a", "output": "b", "history": [["x", ""]]}, "history 1, assistant is empty"),
        ({"instruction": "a", "output": "b", "history": 0}, "history is a number where a list"),
        ({"instruction": "a", "output": "b\0"}, "NUL character, number 2"),
        ({"instruction": "a", "output": "b\ud83d"}, r"half a character, \ud83d, at number 2"),
        ({"instruction": "a" * (8 * 2**20 + 1), "output": "b"}, "longer than 8 Mi characters"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, expected):
    assert expected in reason(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(known_columns(config()))
TURN = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "name", "reasoning_content", "weight"]),
    JSON | st.sampled_from(["user", "gpt", "system", "<think>a</think>", [{"type": "text", "text": "a"}]]),
)


@given(JSON | st.dictionaries(st.sampled_from(NAMES), JSON | st.lists(TURN, max_size=4), max_size=5))
@settings(max_examples=300, deadline=None)
def test_any_value_is_a_conversation_or_a_reason(row):
    try:
        messages = read(row)
    except RowError as error:
        assert str(error)
    else:
        roles = [message.role for message in messages]
        assert roles[-1] == "assistant"
        assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
        assert all(message.content.strip() for message in messages if message.role != "system")
