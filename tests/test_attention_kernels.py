"""Attention of short packed sequences against plain formulas in float64, as torch reference and in Triton's interpreter."""

from itertools import pairwise

import pytest
import torch

from interpreter import assert_passes_in_the_interpreter
from lorikit.model.kernels.attention import Spans, attention, attention_backward
from lorikit.model.kernels.launch import runs_kernel
from test_kernels import DTYPES, INTERPRETER, assert_close, fresh_numbers  # noqa: F401  the fixture is used by all

# own keys of each sequence, how many of the last ask (None: all), shared keys, first sequence that sees them, (H, K, E), window
CASES = {
    "one token": ([1], None, 0, 0, (1, 1, 16), 0),
    "several blocks": ([130, 1, 64, 3], None, 0, 0, (2, 1, 32), 0),
    "an odd head": ([70, 5], None, 0, 0, (3, 1, 24), 0),
    "shared keys in front, which are a sequence": ([5, 40, 0, 63, 9], None, 5, 1, (2, 1, 16), 0),
    "many shared keys": ([70, 3, 1, 0, 0], None, 70, 1, (2, 2, 16), 0),
    "queries at the end": ([9, 130, 1, 66], [2, 1, 1, 65], 0, 0, (1, 1, 16), 0),
    "queries at the end, shared keys": ([12, 100, 7], [3, 66, 7], 6, 0, (2, 1, 16), 0),
    "a window": ([200, 12], None, 0, 0, (1, 1, 16), 20),
    "a window and queries at the end": ([200, 12], [150, 3], 0, 0, (1, 1, 16), 70),
    "a window over shared keys": ([20, 30, 90], None, 20, 1, (1, 1, 16), 33),
}


def spans_of(own, asked, shared, first, window, device="cpu"):
    front = shared if not first else 0
    keys = torch.tensor([front, *own]).cumsum(0)
    queries = torch.tensor([0, *(own if asked is None else asked)]).cumsum(0)
    return Spans(*(t.to(device, torch.int32) for t in (queries, keys)), shared, first, window)


def plain(q, k, v, spans, scale):
    """The formulas, sequence by sequence, with a graph."""
    out = torch.zeros_like(q)
    places = zip(pairwise(spans.cu_q.tolist()), pairwise(spans.cu_k.tolist()), strict=True)
    for number, ((begin, end), (start, stop)) in enumerate(places):
        if end == begin:
            continue
        at = [*range(spans.shared if number >= spans.first else 0), *range(start, stop)]
        for head in range(q.shape[1]):
            kh, vh = (t[at, head * k.shape[1] // q.shape[1]] for t in (k, v))
            scores = q[begin:end, head] @ kh.T * scale
            for i in range(end - begin):
                last = len(at) - (end - begin) + i
                scores[i, last + 1 :] = -torch.inf
                if spans.window:
                    scores[i, : max(0, last + 1 - spans.window)] = -torch.inf
            out[begin:end, head] = scores.softmax(1) @ vh
    return out


def assert_is_the_formulas(own, asked, shared, first, sizes, window, dtype, device="cpu"):
    heads, kv_heads, width = sizes
    spans = spans_of(own, asked, shared, first, window, device)
    queries, keys = int(spans.cu_q[-1]), int(spans.cu_k[-1])
    if queries == keys:
        qkv = torch.randn(keys, (heads + 2 * kv_heads) * width, device=device).to(dtype)
        q, k, v = (t.unflatten(1, (-1, width)) for t in qkv.split([n * width for n in (heads, kv_heads, kv_heads)], 1))
    else:
        q = torch.randn(queries, heads, width, device=device).to(dtype)
        k, v = torch.randn(2, keys, kv_heads, width, device=device).to(dtype)
    grad = torch.randn(queries, heads, width, device=device).to(dtype)
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = plain(*inputs, spans, width**-0.5)
    out, logs = attention(q, k, v, spans, width**-0.5)
    assert out.shape == q.shape and out.dtype == dtype and logs.dtype == torch.float32
    assert_close(out, wanted.detach(), dtype, typical=1.0)
    found = attention_backward(grad, q, k, v, out, logs, spans, width**-0.5)
    for ours, want in zip(found, torch.autograd.grad(wanted, inputs, grad.double()), strict=True):
        assert len(keys_of(own)) == 1 or want.abs().max() > 0
        assert_close(ours, want, dtype, typical=3.0)
    again = attention_backward(grad, q, k, v, out, logs, spans, width**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "sums have one order"
    if queries == keys:
        assert len({t.untyped_storage().data_ptr() for t in found}) == 1, "they are one buffer"


def keys_of(own):
    return [n for n in own if n > 0]


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients_are_the_formulas(case, dtype):
    assert_is_the_formulas(*CASES[case], dtype)


def test_shapes_that_do_not_fit_are_named():
    q, k = torch.zeros(3, 4, 16), torch.zeros(3, 3, 16)
    with pytest.raises(ValueError, match=r"q \(3, 4, 16\).*H a multiple of K"):
        attention(q, k, k, spans_of([3], None, 0, 0, 0), 1.0)


@pytest.mark.skipif(INTERPRETER, reason="this one starts it")
def test_the_kernels_pass_the_same_tests_in_the_interpreter():
    pytest.importorskip("triton")
    assert runs_kernel(torch.ones(1)) is False
    assert_passes_in_the_interpreter(__file__)
