"""What the decoder's layers keep, against the bytes that they really hold, and the choice within a memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorikit.config import LoraSettings
from lorikit.data.pack import pack
from lorikit.model.decoder_config import decoder_shape
from lorikit.model.decoder_memory import Keep, choose, keeps_turned, kept_bytes, passing_bytes
from lorikit.model.load import load_engine
from tiny_decoder import rows, save, settings

LLAMA3_8B = decoder_shape(
    {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 500000.0,
    }
)  # fmt: skip
GIB = 2**30


def held_by(node):
    """Bytes of the storages that a layer's node of the graph holds, but for the adapters' small products."""
    tensors = list(node.saved_tensors)
    if node.kept is not None:
        names = set(type(node.kept).__slots__) - {"z"}
        tensors += [t for t in (getattr(node.kept, name) for name in names) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("level", [Keep.INPUT, Keep.PRODUCTS, Keep.GATE_UP, Keep.ALL])
def test_a_layer_holds_the_bytes_that_its_level_says(family, level, tmp_path):
    base = save(tmp_path, family, num_hidden_layers=3)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(), seed=3)
    engine.highest = level
    batch = pack(rows(one_token=False))
    node = engine.loss_sum(batch).grad_fn.next_functions[0][0]  # the last layer, which is cut to its labels
    middle = node.next_functions[0][0]
    (x,) = middle.saved_tensors
    tokens = len(x)
    want = tokens * kept_bytes(engine.shape, level, 4)
    if level >= Keep.PRODUCTS:
        want -= tokens * 4 * engine.shape.heads  # the attention's sums are held by its own graph
    assert held_by(middle) == want


@given(tokens=st.integers(1, 100_000), free=st.integers(0, 200 * GIB), highest=st.sampled_from(list(Keep)[1:]))
def test_the_levels_are_the_highest_that_fit(tokens, free, highest):
    levels = choose(LLAMA3_8B, tokens, free, 2, highest)
    assert len(levels) == 32 and max(levels) <= highest and max(levels) - min(levels) <= 1
    assert list(levels) == sorted(levels)
    kept = sum(tokens * kept_bytes(LLAMA3_8B, level, 2) for level in levels)
    room = free - passing_bytes(LLAMA3_8B, tokens, 2)
    assert kept <= room or set(levels) == {Keep.HOST}
    if min(levels) < highest:
        one_more = kept_bytes(LLAMA3_8B, Keep(min(levels) + 1), 2) - kept_bytes(LLAMA3_8B, min(levels), 2)
        assert kept + tokens * one_more > room


def test_llama3_8b_on_an_80_gib_gpu_keeps_everything_for_the_tutorials_step_and_nothing_for_a_very_long_row():
    assert set(choose(LLAMA3_8B, 1280, 62 * GIB, 2)) == {Keep.ALL}
    assert min(choose(LLAMA3_8B, 16384, 62 * GIB, 2)) >= Keep.PRODUCTS
    assert set(choose(LLAMA3_8B, 16384, 3 * GIB, 2)) == {Keep.HOST}


def test_levels_keep_more_and_more():
    sizes = [kept_bytes(LLAMA3_8B, level, 2) for level in Keep]
    assert sizes[0] == 0 and sizes == sorted(set(sizes))
    assert torch.finfo(torch.bfloat16).bits == 16 and sizes[Keep.INPUT] == 2 * 4096


def test_fp8_weights_are_kept_transposed_too_where_a_quarter_of_what_is_free_holds_them():
    assert LLAMA3_8B.linear_weights() == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert keeps_turned(LLAMA3_8B, 65 * GIB)
    assert not keeps_turned(LLAMA3_8B, 14 * GIB)
