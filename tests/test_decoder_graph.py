"""Buckets of the decoder's CUDA graphs: a batch gives the same loss and gradients whatever fills it up."""

import pytest
import torch

from lorikit.config import LoraSettings
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE
from lorikit.model.decoder_graph import Bucket, bucket_of, fill_bucket
from lorikit.model.load import load_engine
from tiny_decoder import gradients, randomize_b, rows, save, settings


def engine_for(folder, dropout=0.0, **changes):
    engine = load_engine(
        settings(), save(folder, "qwen2", **changes), new_adapter=LoraSettings(r=4, lora_dropout=dropout)
    )
    assert engine.name == "decoder"
    randomize_b(engine)
    engine.train()
    return engine


def in_bucket(engine, batch, bucket, seed=0):
    """Loss and gradients as the graph of this bucket computes them, without a graph."""
    engine.clear_gradient()
    loss = engine._loss_sum(fill_bucket(batch, bucket).packed(bucket.longest), seed)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in engine.parameters()]


def test_a_bucket_holds_its_batch_and_is_one_of_few():
    batches = [pack(rows(k, seed=k, longest=90)) for k in range(1, 30)]
    buckets = [bucket_of(batch) for batch in batches]
    for batch, bucket in zip(batches, buckets, strict=True):
        assert batch.num_tokens <= bucket.tokens < batch.num_tokens + 128
        assert batch.num_targets <= bucket.labels < batch.num_targets + bucket.tokens // 4
        assert len(batch.cu_seqlens) <= bucket.sequences
        assert batch.max_seqlen <= bucket.longest
        assert bucket.tokens - batch.num_tokens <= bucket.longest
    assert len(set(buckets)) < len(batches) / 2


@pytest.mark.parametrize("more", [(0, 0, 0), (128, 0, 0), (256, 128, 16)])
def test_a_filled_bucket_gives_the_loss_and_gradients_of_the_batch(more, tmp_path):
    engine = engine_for(tmp_path)
    batch = pack(rows(6))
    want_loss, want = gradients(engine, batch)
    bucket = bucket_of(batch)
    bucket = Bucket(bucket.tokens + more[0], bucket.labels + more[1], bucket.sequences + more[2], bucket.longest)
    loss, got = in_bucket(engine, batch, bucket)
    assert torch.allclose(loss, want_loss, rtol=1e-5)
    for ours, theirs in zip(got, want.values() if isinstance(want, dict) else want, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_with_dropout_a_step_does_not_depend_on_its_bucket(tmp_path):
    engine = engine_for(tmp_path, dropout=0.3)
    batch = pack(rows(6))
    small = bucket_of(batch)
    large = Bucket(small.tokens + 128, small.labels + 128, small.sequences + 16, small.longest)
    (loss, grads), (again, more) = (in_bucket(engine, batch, bucket, seed=7) for bucket in (small, large))
    assert torch.allclose(loss, again, rtol=1e-6)
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(grads, more, strict=True))
    other, _ = in_bucket(engine, batch, small, seed=8)
    assert not torch.allclose(loss, other, rtol=1e-4)


def test_a_batch_that_fills_its_bucket_to_the_last_token_needs_no_dummy(tmp_path):
    engine = engine_for(tmp_path)
    batch = pack(rows(6))
    exact = Bucket(batch.num_tokens, batch.num_targets + 3, len(batch.cu_seqlens) - 1, 512)
    filled = fill_bucket(batch, exact)
    assert filled.cu_seqlens.tolist() == batch.cu_seqlens.tolist()
    assert filled.targets[-3:].tolist() == [IGNORE] * 3
    loss, got = in_bucket(engine, batch, exact)
    want_loss, want = gradients(engine, batch)
    assert torch.allclose(loss, want_loss, rtol=1e-5)
    for ours, theirs in zip(got, want.values() if isinstance(want, dict) else want, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_gradients_add_up_in_one_buffer_until_they_are_cleared(tmp_path):
    engine = engine_for(tmp_path)
    first, second = pack(rows(3, seed=1)), pack(rows(3, seed=2))
    engine.clear_gradient()
    losses = [engine.add_gradient(batch) for batch in (first, second)]
    both = engine.adapter.grad.clone()
    engine.clear_gradient()
    assert not engine.adapter.grad.any()
    whole = pack([*rows(3, seed=1), *rows(3, seed=2)])
    assert torch.allclose(engine.add_gradient(whole), losses[0] + losses[1], rtol=1e-5)
    assert (engine.adapter.grad - both).abs().max() <= 1e-4 * both.abs().max()
