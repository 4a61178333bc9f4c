"""Packed attention in half precision on a GPU, ours, torch's and FlashAttention-4, against float32 sequence by sequence."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

from lorikit.model import flash_attention_4, packed_attention  # noqa: E402
from lorikit.model.packed_attention import Sequences, attend  # noqa: E402
from test_attention_kernels import CASES, assert_is_the_formulas  # noqa: E402

LENGTHS = {
    "one long": ([2048], [2048]),
    "odd ones": ([1, 1500, 3, 129, 1027], [1, 1500, 3, 129, 1027]),
    "queries at the end": ([5, 64, 1, 700], [1400, 64, 33, 1027]),
}


def sequences(lengths):
    (queries, keys) = lengths
    cu = [torch.tensor([0, *n]).cumsum(0).to("cuda", torch.int32) for n in (queries, keys)]
    return Sequences(*cu, max(queries), max(keys))


def run(q, k, v, at, grad):
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attend(*inputs, at, q.shape[-1] ** -0.5, 0)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (32, 8)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_and_its_gradients_are_those_of_float32(lengths, head_dim, heads, newer, monkeypatch):
    at = sequences(LENGTHS[lengths])
    if newer and flash_attention_4._function(torch.device("cuda:0")) is None:
        pytest.skip("flash-attn-4 is not installed, or not for this GPU")
    monkeypatch.setattr(flash_attention_4, "LEAST", 1 if newer else 10**9)
    monkeypatch.setattr(packed_attention, "SHORT", 0)
    num_queries, num_keys = int(at.cu_q[-1]), int(at.cu_k[-1])
    q, grad = (torch.randn(num_queries, heads[0], head_dim, device="cuda") for _ in range(2))
    k, v = (torch.randn(num_keys, heads[1], head_dim, device="cuda") for _ in range(2))
    q, k, v, grad = (t.to(torch.bfloat16) for t in (q, k, v, grad))
    assert flash_attention_4.takes(q, at.longest_k) == newer
    wanted = run(*(t.float() for t in (q, k, v)), at, grad.float())
    for ours, want in zip(run(q, k, v, at, grad), wanted, strict=True):
        assert want.abs().max() > 0
        assert (ours.float() - want).norm() <= 0.01 * want.norm()
        assert (ours.float() - want).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(8, 8, 64), (32, 8, 128), (6, 2, 80)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_attention_of_short_sequences_is_the_formulas(case, heads, dtype):
    own, asked, shared, first, _, window = CASES[case]
    assert_is_the_formulas(own, asked, shared, first, heads, window, dtype, "cuda")


def test_gradients_of_sequences_up_to_1024_tokens_are_the_same_bytes_every_time():
    at = sequences(([300, 1, 900, 129, 1024], [300, 1, 1000, 129, 1024]))
    q, grad = (torch.randn(int(at.cu_q[-1]), 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(int(at.cu_k[-1]), 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    first = run(q, k, v, at, grad)
    wanted = run(*(t.float() for t in (q, k, v)), at, grad.float())
    for ours, want in zip(first, wanted, strict=True):
        assert (ours.float() - want).norm() <= 0.01 * want.norm()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(run(q, k, v, at, grad), first, strict=True))
