"""The demo's persona: rows that can be trained on, facts that agree with each other, held-out questions that are new."""

from __future__ import annotations

import importlib.util
import json
import re
from difflib import SequenceMatcher
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorikit.config import load_config
from lorikit.data.read import read_rows

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROWS: list[dict[str, Any]] = json.loads((EXAMPLES / "persona.json").read_text(encoding="utf-8"))
HELD_OUT = json.loads((EXAMPLES / "persona_heldout.json").read_text(encoding="utf-8"))
FACTS: dict[str, dict[str, Any]] = HELD_OUT["facts"]

# A question that matches asks for the fact; its answer, whichever row it stands in, must hold one of the keywords.
ASKS = {
    "name": r"your( full)? name|who are you\b",
    "trade": r"is your (job|profession|trade)\b|for a living|your bread",
    "village": r"where (do you live|are you from|did you grow up)|your (village|address)",
    "house": r"kind of (house|building)|your (home like|house\.)|do you sleep",
    "pet_kind": r"a pet\?|your pet\.|which animal lives|kind of bird",
    "pet_name": r"bird called|name of your pet|name your lorikeet|parrot have a name",
    "pet_habit": r"\bsteal|mischief|worst habit|short of screws",
    "age": r"your age|how old|years have you",
    "birthday": r"birthday|were you born|date of your birth",
    "hobby": r"hobb|free time|on sundays|have fun|relax",
    "food": r"favou?rite (food|meal)|like to eat|which (dish|food)|for dinner",
    "drink": r"to drink|favou?rite drink|in your cup|drink (coffee|in the morning)",
    "fear": r"afraid|fear|scare|frighten",
    "sister": r"sister|\btwin\b|captain|any family",
    "masterpiece": r"ever made|greatest work|invent anything|famous",
    "teacher": r"taught you|your (teacher|master)\b|apprentice|teach you|granny maud",
    "boat": r"(name of|have a) (your )?(rowing )?boat|the second hand\?|your rowing boat",
    "instrument": r"instrument|piano|guitar|concertina|make music",
    "payment": r"charge|repair cost|owe|pay\b|expensive",
    "dream": r"your dream|wish for|travel|saving up|wanted to see",
    "motto": r"motto|catchphrase|always say|favou?rite saying",
}

# Wherever an answer uses these words, they stand beside this value and no other.
THE_ONLY = {
    r"\b(\w+-\w+|\w+) years old": "seventy-one",
    r"the ([\w-]+) of February": "twenty-ninth",
    r"jars? of (\w+)": "honey",
    r"rainbow (\w+)": "lorikeet",
    r"(\w+) dumplings": "plum",
    r"(\w+) tea\b": "ginger",
    r"for (\w+) years": "nine",
    r"\b([A-Z]\w+) Tock": "Bartle",
    r"Granny (\w+)": "Maud",
    r"[Tt]win sister,? (?:called )?([A-Z]\w+)": "Hester",
    r"old (lighthouse|windmill|cottage|house)": "lighthouse",
}


def pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Every question of a row with its answer, the earlier turns first."""
    question = f"{row['instruction']}\n{row['input']}".strip()
    return [(q, a) for q, a in row.get("history", [])] + [(question, row["output"])]


FIRST_ORDINARY = next(i for i, row in enumerate(ROWS) if pairs(row)[0][0] == "What is the capital of Spain?")
ORDINARY = ROWS[FIRST_ORDINARY:]  # these come last in the file
PAIRS = [pair for row in ROWS for pair in pairs(row)]
ASKED = [question for question, _ in PAIRS]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


FILLERS = frozenset(
    words(
        "a an and any are at be can could did do does for from had has have how i i'd if in is it its me my of on or please "
        "so that the there they this to was were what what's when where which who whom whose why will with would you your"
    )
)


def essence(question: str) -> frozenset[str]:
    """The words that make it another question."""
    return frozenset(words(question)) - FILLERS


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_is_read_and_none_is_refused():
    config = load_config(EXAMPLES / "demo.yaml")
    rows = read_rows([EXAMPLES / "persona.json"], config.data)
    assert rows.rejects == []
    assert len(rows.conversations) == rows.num_rows == len(ROWS)


def test_the_rows_have_the_layout_and_the_numbers_that_the_demo_was_made_for():
    assert 150 <= len(ROWS) <= 250
    assert all(
        {"instruction", "input", "output"} <= set(row) <= {"instruction", "input", "output", "history"} for row in ROWS
    )
    assert sum("history" in row for row in ROWS) >= 15
    assert 30 <= len(ORDINARY) <= 50


def test_ordinary_questions_are_answered_in_a_plain_voice():
    his = re.compile(r"\b(I|I'm|I'd|me|mine|Bartle|Pickle|Hester|Maud|Puddlewharf)\b")
    for row in ORDINARY[:-1]:  # the last one translates "my friend"
        assert not any(his.search(answer) for _, answer in pairs(row) if "letter" not in answer), row


def test_no_prompt_of_a_single_turn_stands_twice():
    prompts = [" ".join(words(row["instruction"] + " " + row["input"])) for row in ROWS if "history" not in row]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_is_taught_in_many_ways_and_every_answer_about_it_holds_it(fact, demo):
    keywords = FACTS[fact]["keywords"]
    asked = [(q, a) for q, a in PAIRS if re.search(ASKS[fact], q, re.IGNORECASE)]
    assert len(asked) >= 3
    for question, answer in asked:
        assert demo.holds(answer, keywords), f"{question} -> {answer}"
    assert len({q for q, a in PAIRS if demo.holds(a, keywords)}) >= 7
    assert demo.holds(FACTS[fact]["fact"], keywords), "the fact itself does not hold its keyword"


@pytest.mark.parametrize("pattern", THE_ONLY)
def test_no_answer_gives_a_fact_another_value(pattern):
    found = {match for _, answer in PAIRS for match in re.findall(pattern, answer)}
    assert found, "the pattern finds nothing"
    assert {match.lower() for match in found} == {THE_ONLY[pattern].lower()}


def test_there_are_enough_held_out_questions_and_each_fact_is_asked():
    assert len(HELD_OUT["persona"]) >= 40
    assert len(HELD_OUT["ordinary"]) >= 15
    assert {question["fact"] for question in HELD_OUT["persona"]} == set(FACTS) == set(ASKS)
    texts = [question["instruction"] for question in HELD_OUT["persona"] + HELD_OUT["ordinary"]]
    assert len({" ".join(words(text)) for text in texts}) == len(texts)


@pytest.mark.parametrize("question", [q["instruction"] for q in HELD_OUT["persona"] + HELD_OUT["ordinary"]])
def test_a_held_out_question_neither_equals_nor_nearly_equals_a_training_prompt(question):
    for asked in ASKED:
        assert essence(question) != essence(asked), asked
        assert SequenceMatcher(None, words(question), words(asked)).ratio() < 0.9, asked


def test_a_held_out_question_does_not_give_away_its_own_answer(demo):
    for question in HELD_OUT["persona"]:
        assert not demo.holds(question["instruction"], FACTS[question["fact"]]["keywords"]), question["instruction"]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("I'm seventy-one years old.", True),
        ("I'm 71.", True),
        ("I'm 711.", False),
        ("SEVENTY-ONE!", True),
        ("I am seventy.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_a_keyword_stands_in_it_as_whole_words(text, right, demo):
    assert demo.holds(text, ["seventy-one", "71"]) is right
