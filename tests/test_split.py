"""Who is held out depends on what the prompts say, and on nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.data.split import MOST_ALIKE, group_keys, prompt_key, split
from lorikit.data.values import Conversation, Message
from lorikit.errors import ConfigError

prompts = st.lists(st.integers(0, 40), min_size=2, max_size=60)
sizes = st.one_of(st.floats(0.001, 0.99), st.integers(1, 59))


def row(*texts, system=None):
    turns = [Message("system", system)] if system else []
    turns += [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Conversation(tuple(turns), "rows.json:1")


def key(number):
    return prompt_key(row(f"question {number}", "an answer"))


def held_out(numbers, size):
    """The prompts held out of rows with these prompts."""
    return {number for number, out in zip(numbers, split([key(n) for n in numbers], size), strict=True) if out}


def test_a_prompt_is_everything_before_the_last_answer():
    assert prompt_key(row("hello", "hi")) == prompt_key(row("hello", "go away"))
    assert prompt_key(row("hello", "hi", "and now?", "a")) == prompt_key(row("hello", "hi", "and now?", "b"))
    assert prompt_key(row("hello", "hi", "and now?", "a")) != prompt_key(row("hello", "ho", "and now?", "a"))
    assert prompt_key(row("hello", "hi")) != prompt_key(row("hello", "hi", system="You are Pip."))


def test_prompts_that_differ_in_white_space_or_case_are_equal():
    assert prompt_key(row(" Who  are\nyou?", "Pip")) == prompt_key(row("who are you?", "a cat"))
    assert prompt_key(row("STRASSE", "a")) == prompt_key(row("straße", "a"))


def test_who_speaks_is_part_of_the_prompt():
    as_user = Conversation((Message("user", "x"), Message("assistant", "a")), "r:1")
    as_system = Conversation((Message("system", "x"), Message("assistant", "a")), "r:1")
    assert prompt_key(as_user) != prompt_key(as_system)


def test_text_that_is_no_unicode_has_a_key_too():
    assert len(prompt_key(row("half a pair \ud83d", "a"))) == 32


@given(prompts, sizes)
def test_equal_prompts_stay_on_one_side_and_neither_side_is_empty(numbers, size):
    if size >= len(numbers):
        return
    out = split([key(n) for n in numbers], size)
    sides = [{n for n, is_out in zip(numbers, out, strict=True) if is_out == side} for side in (True, False)]
    assert sides[0].isdisjoint(sides[1])
    assert all(sides) == (len(set(numbers)) > 1)


@given(prompts, sizes, st.randoms())
def test_the_order_of_the_rows_does_not_matter(numbers, size, random):
    if size >= len(numbers):
        return
    shuffled = random.sample(numbers, len(numbers))
    assert held_out(numbers, size) == held_out(shuffled, size)


@given(st.integers(0, 300))
def test_rows_that_are_added_do_not_move_old_ones(added):
    old = list(range(200))
    assert held_out(old, 0.1) == held_out(old + list(range(200, 200 + added)), 0.1) & set(old)


def test_a_share_holds_out_about_that_share():
    assert 420 <= len(held_out(range(5000), 0.1)) <= 580


@given(st.integers(1, 49))
def test_a_number_of_rows_is_met_exactly_when_prompts_differ(number):
    assert len(held_out(range(50), number)) == number


@given(prompts, st.integers(1, 59))
def test_a_number_of_rows_is_never_exceeded_where_a_group_fits(numbers, number):
    if number >= len(numbers) or min(numbers.count(n) for n in numbers) > number:
        return
    assert 1 <= sum(split([key(n) for n in numbers], number)) <= number


def test_a_number_below_every_group_holds_out_the_smallest_group():
    assert held_out([1] * 5 + [2] * 3 + [3] * 4, 2) == {2}


def test_nothing_is_held_out_of_one_prompt_or_when_nothing_is_wanted():
    assert split([key(1)] * 10, 0.5) == [False] * 10
    assert split([key(n) for n in range(10)], 0) == [False] * 10
    assert split([], 0.05) == []


def test_a_number_that_leaves_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match=r"eval_size is 10 rows, but only 10 can be used"):
        split([key(n) for n in range(10)], 10)


WORDS = [
    "where",
    "does",
    "the",
    "old",
    "captain",
    "keep",
    "his",
    "brass",
    "compass",
    "when",
    "storms",
    "come",
    "in",
    "from",
    "sea",
]
questions = st.lists(st.sampled_from(WORDS), min_size=3, max_size=10).map(" ".join)
asked = st.lists(st.one_of(questions, questions.map(lambda text: text.title() + "?")), min_size=2, max_size=25)


def groups(texts):
    return group_keys([row(text, "an answer") for text in texts])


def test_prompts_that_differ_in_punctuation_or_little_are_one_group():
    same = ["Where does the old captain keep his compass?", "where does the old captain keep his compass", "所以呢"]
    keys = groups([*same[:2], "Tell me where does the old captain keep his compass?", same[2], "所以呢？"])
    assert keys[0] == keys[1] == keys[2] != keys[3] == keys[4]


def test_what_was_said_before_the_question_and_by_whom_keeps_groups_apart():
    rows = [
        row("and now?", "a"),
        row("hello", "hi", "and now?", "a"),
        row("hello!", "Hi", "And now", "b"),
        row("and now?", "a", system="x"),
    ]
    keys = group_keys(rows)
    assert keys[1] == keys[2] and len(set(keys)) == 3


def test_a_group_of_many_different_prompts_is_a_template_and_falls_apart():
    head = "Write one polite sentence that declines an invitation, and mention this reason for it: "
    few, many = ([head + chr(ord("a") + k) + "x" for k in range(n)] for n in (MOST_ALIKE, MOST_ALIKE + 1))
    assert len(set(groups(few))) == 1 and len(set(groups(many))) == MOST_ALIKE + 1
    assert len(set(groups(few * 3))) == 1


@settings(max_examples=60)
@given(asked, st.floats(0.05, 0.9))
def test_nearly_equal_prompts_stay_on_one_side(texts, size):
    from lorikit.data.near import near_groups

    sides = {}
    for root, out in zip(near_groups(texts), split(groups(texts), size), strict=True):
        sides.setdefault(root, set()).add(out)
    assert all(len(side) == 1 for side in sides.values())


@settings(max_examples=60)
@given(asked, st.randoms(use_true_random=False))
def test_keys_of_groups_do_not_depend_on_the_order_of_the_rows(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert dict(zip(texts, groups(texts), strict=True)) == dict(zip(shuffled, groups(shuffled), strict=True))


@settings(max_examples=60)
@given(asked, asked)
def test_an_added_row_changes_no_group_but_the_one_it_joins(old, added):
    before = dict(zip(old, groups(old), strict=True))
    after = dict(zip(old + added, groups(old + added), strict=True))
    joined = {after[text] for text in added}
    assert all(after[text] == before[text] or after[text] in joined for text in old)


def test_a_share_of_near_equal_prompts_is_met_about_and_a_number_exactly_where_groups_allow():
    places = [f"{a} {b}" for a in WORDS for b in WORDS]
    texts = [form for place in places for form in (f"Which way is {place}", f"which way is {place}?")]
    keys = groups(texts)
    assert abs(sum(split(keys, 0.2)) / len(texts) - 0.2) < 0.06
    assert sum(split(keys, 50)) == 50
