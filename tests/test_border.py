"""Tokenising in one go with borders gives what tokenising run by run gives, for every kind of tokenizer."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import tokenizers
from lorikit.config import DataConfig
from lorikit.data.border import Rendered
from lorikit.data.encode import Encoder
from lorikit.data.examples import PackedExamples
from lorikit.data.values import Conversation, Message
from lorikit.errors import DataError

KINDS = sorted(tokenizers())


@cache
def encoder(kind, train_on="all"):
    return Encoder(tokenizers()[kind], DataConfig(train="x", train_on=train_on))


pieces = st.one_of(
    st.text(max_size=12),
    st.sampled_from([" ", "  ", "\n\n", "a b", "é", "你好", "1234", "<|", "|>", "[INST]", "</s", "_", "ſ", "İ"]),
)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(str.strip)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(KINDS), st.data())
def test_ids_counts_and_control_tokens_are_those_of_encoding_run_by_run(kind, data):
    made = encoder(kind)
    spelled = sorted(made.tokenizer.get_added_vocab())
    parts = data.draw(st.lists(st.one_of(texts, st.sampled_from(spelled)), min_size=1, max_size=8))
    text = "".join(parts)
    # As in a rendered template: an answer begins between two parts, not inside a control token.
    edges = [sum(map(len, parts[:n])) for n in range(len(parts) + 1)]
    cuts = data.draw(st.lists(st.sampled_from(edges), max_size=3))
    safe = made._safe
    found = safe.encode(text, {}, cuts)
    assert found == safe._encode_by_runs(text, {}, cuts)
    assert safe.encode_all([Rendered(text, {}, cuts)] * 3) == [found] * 3


def test_common_tokenizers_are_encoded_in_one_go():
    for kind in ("llama3", "chatml", "qwen3"):
        made = encoder(kind)
        text = made.render([Message("user", "Who are you?"), Message("assistant", "Nobody.")])
        (encoded,) = made._safe._border.encode([Rendered(text, {}, [text.index("Nobody")])])
        assert encoded is not None, kind


@pytest.mark.parametrize("kind", ["llama3", "qwen3", "gemma"])
def test_many_rows_at_a_time_are_what_they_are_one_by_one_and_refused_ones_keep_their_place(kind):
    made = encoder(kind)
    rows = []
    for number in range(600):  # more than two batches
        text = f"Say {number}." if number % 7 else f"Say <|eot_id|><|im_end|> {number}."
        if number % 100 == 99:
            text = "\U0010fffd"
        turns = [Message("user", text), Message("assistant", f"I say {number}, 你好.")] * (1 + number % 2)
        rows.append(Conversation(tuple(turns), f"f:{number}"))
    found = list(made.encode_all(iter(rows)))
    assert len(found) == 600
    for row, examples in zip(rows, found, strict=True):
        try:
            assert examples == made.encode(row)
        except DataError as error:
            assert str(examples) == str(error) and "U+10FFFD" in str(error)
    assert sum(isinstance(examples, DataError) for examples in found) == 6


def test_packed_examples_are_the_examples():
    examples = [example for text in ("a", "b c") for example in encoder("llama3").encode(_row(text))]
    packed = PackedExamples(examples)
    assert len(packed) == 2 and list(packed) == examples and packed[-1] == examples[-1] and packed[:1] == examples[:1]
    assert PackedExamples.joined([packed, packed]) == examples * 2 and packed != examples[:1]


def _row(text):
    return Conversation((Message("user", text), Message("assistant", text)), f"f:{text}")
