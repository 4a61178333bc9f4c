"""What is shown of an answer while it comes: whole characters, nothing of a stop string, and exact bytes of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikit.config import DataConfig
from lorikit.data.encode import Encoder
from lorikit.model.engine import Token
from lorikit.serve.words import LEAST_LOGPROB, Words, token_bytes
from tiny_model import byte_fallback_tokenizer, byte_level_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return Encoder(byte_level_tokenizer(), DataConfig(train="none"))


def say(encoder, text, stop, finish="stop"):
    """The pieces that are shown and how it ends, when a model says `text` a byte at a time."""
    words, pieces = Words(encoder, stop), []
    ids = encoder.text_ids(text)
    ids += [min(encoder.stop_ids)] if finish == "stop" else []
    for place, token_id in enumerate(ids):
        piece = words.add(Token(0, token_id, finish if place == len(ids) - 1 else None))
        pieces.append(piece.text)
        if piece.finish:
            return pieces, piece.finish, words
    return pieces, None, words


letters = st.text(alphabet="abé好😀", max_size=30)


@given(
    letters,
    st.lists(st.text(alphabet="abé好😀", min_size=1, max_size=4), max_size=3),
    st.sampled_from(["stop", "length"]),
)
def test_the_text_is_cut_before_the_stop_string_that_is_complete_first_and_no_piece_is_taken_back(
    encoder, text, stop, finish
):
    ends = {text.find(s) + len(s): text.find(s) for s in stop if s in text}
    first = min(ends) if ends else None  # of those complete at the same letter, the earliest beginning
    begins = min((text.find(s) for s in stop if s in text[:first]), default=None) if ends else None
    want = text if begins is None else text[:begins]
    pieces, end, words = say(encoder, text, stop, finish)
    assert "".join(pieces) == words.text == want
    if text or finish == "stop":
        assert end == ("stop" if ends else finish)


def test_text_is_held_back_only_as_long_as_it_may_begin_a_stop_string(encoder):
    pieces, end, _ = say(encoder, "one END two ENDING", ["ENDING"])
    assert "".join(pieces) == "one END two " and end == "stop"
    assert pieces[:3] == ["o", "n", "e"] and pieces[4:7] == ["", "", ""] and pieces[7] == "END "


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_the_bytes_of_tokens_together_are_the_bytes_of_the_text(make):
    encoder = Encoder(make(), DataConfig(train="none"))
    text = "hang 好 é 😀" if make is byte_level_tokenizer else "好é"
    assert b"".join(token_bytes(encoder, i) for i in encoder.text_ids(text)).strip() == text.encode()
    assert token_bytes(encoder, min(encoder.control_ids)) in (b"<|im_start|>", b"<|im_end|>")
    assert token_bytes(encoder, 10**6) == b""


def test_minus_infinity_is_a_number_that_json_has(encoder):
    words = Words(encoder, ())
    piece = words.add(Token(0, 40, None, float("-inf"), ((41, -0.5), (40, float("-inf")))))
    assert piece.logprobs[0]["logprob"] == LEAST_LOGPROB == piece.logprobs[0]["top_logprobs"][1]["logprob"]
