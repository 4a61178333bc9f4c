"""Texts that say nearly the same are found, in any order of the texts, and what is different is kept apart."""

import random
from collections import defaultdict
from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.data.near import BAND, NEARLY_EQUAL, NUM_HASHES, WORTH_A_LOOK, grams, jaccard, near_groups, numbers, plain

WORDS = [
    "the",
    "a",
    "cat",
    "sat",
    "on",
    "mat",
    "with",
    "hat",
    "and",
    "then",
    "it",
    "ran",
    "away",
    "from",
    "big",
    "dog",
    "next",
    "door",
    "who",
    "barked",
    "all",
    "night",
]
SENTENCE = "please tell me where the old library keeps its maps of the harbour"


def together(texts, kinds=None):
    """The groups of more than one, as sets of texts."""
    groups = defaultdict(set)
    for text, root in zip(texts, near_groups(texts, kinds), strict=True):
        groups[root].add(text)
    return sorted((sorted(group) for group in groups.values() if len(group) > 1), key=str)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Who are you?", "who  are\nyou"),
        ("Who are you?", "Ｗｈｏ ａｒｅ ｙｏｕ？"),
        ("你是谁？", "你是谁"),
        ("c'est l’été", "C’est l'ÉTÉ!"),
        (SENTENCE, SENTENCE + " please"),
        (SENTENCE, SENTENCE.replace("old", "odl")),
        ("朕知道你心里一直惦记着眉庄姐姐的病情", "朕知道你心里一直惦记着眉庄姐姐病情"),
    ],
)
def test_nearly_equal_texts_are_one_group(left, right):
    assert near_groups([left, "something else", right]) == [0, 1, 0]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Count to 3.", "Count to 4."),
        (SENTENCE + " at 10:30", SENTENCE + " at 10:31"),
        ("2 + 2", "2 * 2"),
        ("Who are you?", "Where are you?"),
        ("皇上驾到！", "皇后驾到！"),
        ("👍", "👎"),
        ("की", "का"),
        ("", "a"),
    ],
)
def test_what_differs_in_what_it_says_is_not(left, right):
    assert near_groups([left, right]) == [0, 1]


def test_texts_of_two_kinds_are_never_compared():
    assert near_groups([SENTENCE, SENTENCE, SENTENCE], ["a", "b", "a"]) == [0, 1, 0]


def test_plain_leaves_nothing_empty_that_says_something():
    assert plain(" ?! ") == "?!" and plain("👍 👍") == "👍👍" and plain("Straße 5") == "strasse5"
    assert numbers("3 of 1,000 at 10:30, v2.5") == ("3", "1,000", "10:30", "2.5")


sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)


@settings(max_examples=50)
@given(st.lists(sentences, min_size=2, max_size=20), st.randoms(use_true_random=False))
def test_the_order_of_the_texts_does_not_matter(texts, rng):
    assert together(texts) == together(rng.sample(texts, len(texts)))


@settings(max_examples=50)
@given(st.lists(st.one_of(sentences, st.text(max_size=12)), max_size=12))
def test_every_group_hangs_together_over_pairs_that_are_nearly_equal(texts):
    for group in together(texts):
        reached, rest = {plain(group[0])}, {plain(text) for text in group}
        while found := {t for t in rest - reached if any(jaccard(grams(t), grams(r)) >= NEARLY_EQUAL for r in reached)}:
            reached |= found
        assert reached == rest


def test_nearly_all_pairs_above_the_bound_are_found_among_many_others():
    rng = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(400)]
    base = [" ".join(rng.choices(vocabulary, k=15)) for _ in range(600)]
    changed = [" ".join(w if k != 7 else rng.choice(vocabulary) for k, w in enumerate(t.split())) for t in base]
    near = {k for k in range(600) if jaccard(grams(plain(base[k])), grams(plain(changed[k]))) >= 0.85}
    groups = near_groups(base + changed)
    found = {k for k in near if groups[k] == groups[600 + k]}
    assert len(near) > 100 and len(found) >= 0.95 * len(near)
    assert len(set(groups)) >= 600


def test_a_template_of_many_texts_is_compared_in_bounded_time_and_without_losing_copies():
    rng = random.Random(5)
    head = "Translate the following sentence into French and keep its tone as it is in the original: "
    texts = [head + " ".join(rng.choices(WORDS, k=3)) for _ in range(2000)]
    groups = near_groups(texts + texts)
    assert groups[:2000] == groups[2000:]


def test_lone_surrogates_and_no_texts_at_all_are_taken():
    assert near_groups([]) == [] and near_groups(["half \ud83d", "half \ud83d"]) == [0, 0]
    assert all(len({*near_groups([a, b])}) == 2 for a, b in combinations(["x", "y", "z" * 5000], 2))


@pytest.mark.parametrize(("index", "percent"), [(0.8, 87), (0.85, 99), (0.9, 100)])
def test_the_share_of_pairs_that_are_found_is_as_documented(index, percent):
    fewest = round(WORTH_A_LOOK * NUM_HASHES)
    agree = sum(comb(NUM_HASHES, k) * index**k * (1 - index) ** (NUM_HASHES - k) for k in range(fewest, NUM_HASHES + 1))
    a_band = 1 - (1 - index**BAND) ** (NUM_HASHES // BAND)
    assert a_band > 0.999 and round(100 * agree) == percent
