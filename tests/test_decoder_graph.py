"""Buckets of the decoder's CUDA graphs: a batch gives the same loss and gradients whatever fills it up."""

from dataclasses import replace

import pytest
import torch

from lorikit.config import LoraSettings
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.model.decoder_batch import lay_out
from lorikit.model.decoder_graph import bucket_of, fill_bucket
from lorikit.model.load import load_engine
from tiny_decoder import gradients, randomize_b, rows, save, settings, take_short_attention


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
    loss = engine._loss_sum(fill_bucket(batch, lay_out(batch), bucket).packed(bucket.longest), seed)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in engine.parameters()]


def sharing(examples, prefix=(4, 9, 11, 5, 8, 6)):
    """The rows behind a system prompt, as it were."""
    return [Example([*prefix, *e.input_ids], [IGNORE] * len(prefix) + e.labels, e.source) for e in examples]


@pytest.mark.parametrize("shared", [False, True])
def test_a_bucket_holds_its_batch_and_is_one_of_few(shared):
    several = [rows(k, seed=k, longest=90) for k in range(2, 30)]
    layouts = [lay_out(pack(sharing(examples) if shared else examples)) for examples in several]
    buckets = [bucket_of(at) for at in layouts]
    for at, bucket in zip(layouts, buckets, strict=True):
        assert at.prefix >= 5 if shared else at.prefix == 0
        assert bucket.prefix == at.prefix
        assert len(at.tokens) < bucket.tokens <= len(at.tokens) + (64 if len(at.tokens) < 512 else 128)
        assert len(at.labelled) <= bucket.labels < len(at.labelled) + bucket.tokens // 4
        assert len(at.starts) + 2 <= bucket.sequences
        assert at.lengths.max() <= bucket.longest
        # the dummy's keys: what fills the tokens, and the copies that are not needed
        assert bucket.tokens - len(at.tokens) + (bucket.sequences - len(at.starts)) * at.prefix <= bucket.longest
    assert len(set(buckets)) < len(several) * 0.8


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("more", [(0, 0, 0), (128, 0, 0), (256, 128, 16)])
def test_a_filled_bucket_gives_the_loss_and_gradients_of_the_batch(more, shared, short, tmp_path, monkeypatch):
    engine = engine_for(tmp_path)
    batch = pack(sharing(rows(6)) if shared else rows(6))
    want_loss, want = gradients(engine, batch)
    if short:
        take_short_attention(monkeypatch)
    bucket = bucket_of(lay_out(batch))
    bucket = replace(
        bucket, tokens=bucket.tokens + more[0], labels=bucket.labels + more[1], sequences=bucket.sequences + more[2]
    )
    loss, got = in_bucket(engine, batch, bucket)
    assert torch.allclose(loss, want_loss, rtol=1e-5)
    for ours, theirs in zip(got, want.values() if isinstance(want, dict) else want, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_with_dropout_a_step_does_not_depend_on_its_bucket(tmp_path):
    engine = engine_for(tmp_path, dropout=0.3)
    batch = pack(rows(6))
    small = bucket_of(lay_out(batch))
    large = replace(small, tokens=small.tokens + 128, labels=small.labels + 128, sequences=small.sequences + 16)
    (loss, grads), (again, more) = (in_bucket(engine, batch, bucket, seed=7) for bucket in (small, large))
    assert torch.allclose(loss, again, rtol=1e-6)
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(grads, more, strict=True))
    other, _ = in_bucket(engine, batch, small, seed=8)
    assert not torch.allclose(loss, other, rtol=1e-4)


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
