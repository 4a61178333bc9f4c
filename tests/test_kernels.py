"""The kernels against plain formulas in float64, forward and backward.

On a machine without a GPU the same functions run as torch references and, in a second process, as Triton kernels in its
interpreter. The tests on a GPU take their checks from here.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorikit.model.kernels.adamw import adamw_step
from lorikit.model.kernels.dropout import dropout_mask
from lorikit.model.kernels.launch import runs_kernel
from lorikit.model.kernels.lora_a import lora_a, lora_a_backward
from lorikit.model.kernels.lora_b import add_lora_b, lora_b_backward
from lorikit.model.kernels.rmsnorm import add_rmsnorm, rmsnorm, rmsnorm_backward
from lorikit.model.kernels.rope import rope, rope_backward
from lorikit.model.kernels.swiglu import swiglu, swiglu_backward
from lorikit.model.kernels.swiglu_lora import swiglu_lora, swiglu_lora_backward

MASKS = Path(__file__).with_name("test_kernels_masks.py")
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EPS = 1e-5


@pytest.fixture(autouse=True)
def fresh_numbers():
    """Other inputs in every run; a failure prints the seed that repeats them."""
    seed = int(os.environ.get("LORIKIT_TEST_SEED", random.randrange(2**31)))
    print(f"LORIKIT_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)


def assert_close(got, want, dtype, typical=0.0):
    """Within a few roundings of the largest value, or of the `typical` one where there are few and all may be small."""
    assert got.dtype == dtype, got.dtype
    assert got.shape == want.shape, (got.shape, want.shape)
    error, bound = (got.double() - want).abs().max(), 8 * torch.finfo(dtype).eps * max(want.abs().max(), typical)
    assert error <= bound, f"off by {error:.2e}, allowed are {bound:.2e}"


def exact(x):
    """A float64 leaf with x's values."""
    return x.detach().double().requires_grad_()


def formula_rmsnorm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def check_rmsnorm(shape, dtype, device="cpu", *, strided=False):
    wide = torch.randn((*shape[:-1], shape[-1] + 24), device=device).to(dtype)
    x = wide[..., 8 : shape[-1] + 8] if strided else wide[..., : shape[-1]].contiguous()
    weight = (1 + torch.randn(shape[-1], device=device) / 4).to(dtype)
    leaf = exact(x)
    want = formula_rmsnorm(leaf, weight.double())
    assert_close(rmsnorm(x, weight, EPS), want.detach(), dtype)
    grad = torch.randn(shape, device=device).to(dtype)
    (want_grad,) = torch.autograd.grad(want, leaf, grad.double())
    assert_close(rmsnorm_backward(grad, x, weight, EPS), want_grad, dtype)
    plus = torch.randn_like(wide)[..., : shape[-1]]
    assert_close(rmsnorm_backward(grad, x, weight, EPS, plus=plus), plus.double() + want_grad, dtype)


def check_add_rmsnorm(tokens, width, dtype, device="cpu"):
    x, delta = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    weight = (1 + torch.randn(width, device=device) / 4).to(dtype)
    total, y = add_rmsnorm(x, delta, weight, EPS)
    assert_close(total, x.double() + delta.double(), dtype)
    assert_close(y, formula_rmsnorm(x.double() + delta.double(), weight.double()), dtype)


def tables(positions, width, device="cpu"):
    angles = torch.arange(positions)[:, None] * (10000.0 ** -(torch.arange(0, width, 2) / width))
    return angles.cos().to(device), angles.sin().to(device)


def formula_rope(x, cos, sin):
    c, s = (torch.cat([t, t], -1)[:, None, :].double() for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s


def check_rope(tokens, heads, kv_heads, width, dtype, device="cpu"):
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    before = fused.clone()
    parts = fused.view(tokens, heads + 2 * kv_heads, width)
    q, k, v = parts.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = tables(50, width, device)
    positions = torch.randint(0, 50, (tokens,), device=device)
    wanted = []
    for x in (q, k):
        leaf = exact(x)
        turned = formula_rope(leaf, cos[positions], sin[positions])
        wanted.append((turned.detach(), torch.autograd.grad(turned, leaf, x.double())[0]))
    rope(q, k, cos, sin, positions)
    assert_close(q, wanted[0][0], dtype)
    assert_close(k, wanted[1][0], dtype)
    assert torch.equal(v, before.view_as(parts)[:, heads + kv_heads :]), "the values are no queries or keys"
    grads = before.clone().view_as(parts)
    rope_backward(grads[:, :heads], grads[:, heads : heads + kv_heads], cos, sin, positions)
    assert_close(grads[:, :heads], wanted[0][1], dtype)
    assert_close(grads[:, heads : heads + kv_heads], wanted[1][1], dtype)


def check_swiglu(tokens, width, dtype, device="cpu"):
    gate_up = (3 * torch.randn(tokens, 2 * width, device=device)).to(dtype)
    leaf = exact(gate_up)
    gate, up = leaf.chunk(2, dim=1)
    want = gate / (1 + torch.exp(-gate)) * up
    assert_close(swiglu(gate_up), want.detach(), dtype)
    grad = torch.randn(tokens, width, device=device).to(dtype)
    (want_grad,) = torch.autograd.grad(want, leaf, grad.double())
    assert_close(swiglu_backward(grad, gate_up), want_grad, dtype)
    assert swiglu_backward(grad, gate_up, out=gate_up) is gate_up
    assert_close(gate_up, want_grad, dtype)


def check_swiglu_lora(tokens, width, present, rank, dtype, device="cpu"):
    """`present`: 0 for gate, 1 for up. Against the formula, and against adding the adapters first, rounding for rounding."""
    gate_up = (3 * torch.randn(tokens, 2 * width + 8, device=device)).to(dtype)[:, : 2 * width]
    z = torch.randn(tokens, len(present) * rank, device=device).to(dtype)
    b = [(torch.randn(width, rank, device=device) / math.sqrt(rank)).to(dtype) for _ in present]
    rest = z, b, [width * m for m in present], 0.75
    before, summed = gate_up.clone(), gate_up.clone()
    add_lora_b(summed, *rest)
    leaf = exact(summed)
    gate, up = leaf.chunk(2, dim=1)
    want = gate / (1 + torch.exp(-gate)) * up
    grad = torch.randn(tokens, width, device=device).to(dtype)
    (want_grad,) = torch.autograd.grad(want, leaf, grad.double())
    got = swiglu_lora(gate_up, *rest), swiglu_lora_backward(grad, gate_up, *rest)
    assert got[0].is_contiguous() and torch.equal(gate_up, before), "the product is left as it is"
    for ours, exactly in zip(got, (want.detach(), want_grad), strict=True):
        assert_close(ours, exactly, dtype, typical=1.0)
    if dtype != torch.float32:  # a sum in another order is rounded to another number now and then, and no more
        for ours, apart in zip(got, (swiglu(summed), swiglu_backward(grad, summed)), strict=True):
            assert (ours != apart).sum() <= 3 + ours.numel() / 100


def check_lora_a(tokens, width, modules, rank, p, dtype, device="cpu"):
    x = torch.randn(tokens, width + 8, device=device).to(dtype)[:, :width]
    a = torch.randn(modules, rank, width, device=device) / math.sqrt(width)
    a = a if rank % 2 else a.to(dtype)  # float32 master weights are taken as well
    seed, streams = random.getrandbits(63), random.sample(range(300), modules)
    x_leaf, a_leaf = exact(x), exact(a.to(dtype))
    masks = [dropout_mask(seed, s, x.shape, p, device).double() / (1 - p) for s in streams]
    want = torch.cat([(x_leaf * mask) @ a_m.t() for mask, a_m in zip(masks, a_leaf, strict=True)], dim=1)
    assert_close(lora_a(x, a, p, seed, streams), want.detach(), dtype)
    grad = torch.randn(tokens, modules * rank, device=device).to(dtype)
    want_x, want_a = torch.autograd.grad(want, (x_leaf, a_leaf), grad.double())
    grad_x, grad_a = lora_a_backward(grad, x, a, p, seed, streams)
    assert_close(grad_x, want_x, dtype)
    assert grad_a.dtype == torch.float32
    assert_close(grad_a.to(dtype), want_a, dtype)
    given = torch.randn(tokens, width, device=device).to(dtype)
    before = given.double()
    result, _ = lora_a_backward(grad, x, a, p, torch.tensor(seed, device=device), streams, given)
    assert result is given
    assert_close(given, before + want_x, dtype, typical=1.0)
    nothing, again = lora_a_backward(grad, x, a, p, seed, streams, needs_x=False)
    assert nothing is None
    assert torch.equal(again, grad_a), "the same inputs give the same bytes"


def check_lora_b(tokens, sizes, present, rank, dtype, device="cpu"):
    starts = [sum(sizes[:m]) for m in present]
    y = torch.randn(tokens, sum(sizes), device=device).to(dtype)
    u = torch.randn(tokens, len(present) * rank, device=device).to(dtype)
    b = [torch.randn(sizes[m], rank, device=device).to(dtype) / 8 for m in present]
    leaves = [exact(t) for t in (u, *b)]
    want = y.double()
    for start, matrix, part in zip(starts, leaves[1:], leaves[0].chunk(len(b), dim=1), strict=True):
        added = 2.5 * part @ matrix.t()
        want = want + torch.nn.functional.pad(added, (start, sum(sizes) - start - matrix.shape[0]))
    add_lora_b(y, u, b, starts, 2.5)
    assert_close(y, want.detach(), dtype, typical=1.0)  # one value may be the small rest of two large ones
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(want, leaves, grad.double())
    grad_u, grad_b = lora_b_backward(grad, u, b, starts, 2.5)
    assert_close(grad_u, wanted[0], dtype, typical=max(m.shape[0] for m in b) ** 0.5)
    for got, expected in zip(grad_b, wanted[1:], strict=True):
        assert got.dtype == torch.float32
        assert_close(got.to(dtype), expected, dtype)


def check_adamw(size, max_norm, steps, device="cpu"):
    start = torch.randn(size, device=device)
    peer = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([peer], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    param = start.clone()
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    largest = 0.0  # gradient: moments of one value may cancel
    for number in range(steps):
        grad = torch.randn(size, device=device) * 10 ** random.uniform(-3, 1)
        largest = max(largest, grad.abs().max().item())
        peer.grad = grad.clone()
        rate = 1e-2 / (number + 1)
        optimizer.param_groups[0]["lr"] = rate
        want_norm = torch.nn.utils.clip_grad_norm_([peer], max_norm or math.inf)
        optimizer.step()
        kept, count = grad.mul_(number + 1).clone(), number + 1
        norm = adamw_step(param, grad, exp_avg, exp_avg_sq, number + 1, rate, (0.9, 0.999), 1e-8, 0.1, max_norm, count)
        assert norm.item() == pytest.approx(want_norm.item(), rel=1e-5)
        assert torch.equal(grad, kept), "the gradient is the caller's"
        assert_close(param, peer.detach().double(), torch.float32, typical=1.0)
        assert_close(exp_avg, optimizer.state[peer]["exp_avg"].double(), torch.float32, typical=largest / 10)
        assert_close(exp_avg_sq, optimizer.state[peer]["exp_avg_sq"].double(), torch.float32)
    for value in (math.nan, math.inf):
        grad[size // 2] = value
        state = [t.clone() for t in (param, exp_avg, exp_avg_sq)]
        norm = adamw_step(param, grad, exp_avg, exp_avg_sq, steps + 1, 1.0, (0.9, 0.999), 1e-8, 0.1, max_norm)
        assert not norm.isfinite()
        assert all(torch.equal(a, b) for a, b in zip(state, (param, exp_avg, exp_avg_sq), strict=True))
    stopped = torch.zeros((), dtype=torch.int32, device=device)
    rest = (steps + 1, 1.0, (0.9, 0.999), 1e-8, 0.1, max_norm, 1, stopped)
    assert not adamw_step(param, grad, exp_avg, exp_avg_sq, *rest).isfinite()
    assert stopped.item() == 1
    assert adamw_step(param, torch.ones_like(grad), exp_avg, exp_avg_sq, *rest).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(state, (param, exp_avg, exp_avg_sq), strict=True))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 16), (3, 37), (5, 576), (1, 1, 8), (7, 3, 20)])
@pytest.mark.parametrize("strided", [False, True])
def test_rmsnorm_and_its_gradient_are_the_formulas(shape, dtype, strided):
    check_rmsnorm(shape, dtype, strided=strided)


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (9, 100), (4, 576)])
def test_the_sum_before_the_norm_comes_with_it(tokens, width, dtype):
    check_add_rmsnorm(tokens, width, dtype)


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (5, 3, 1, 6), (11, 9, 3, 64), (2, 4, 4, 48)])
def test_rope_turns_views_of_one_buffer_and_back(sizes, dtype):
    check_rope(*sizes, dtype)


def test_rope_of_queries_alone_takes_keys_without_heads():
    q, (cos, sin) = torch.randn(3, 2, 8), tables(9, 8)
    want = formula_rope(q.double(), cos[[4, 0, 8]], sin[[4, 0, 8]])
    rope(q, q[:, :0], cos, sin, torch.tensor([4, 0, 8]))
    assert_close(q, want, torch.float32)


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 77), (3, 1536)])
def test_swiglu_and_its_gradient_are_the_formulas(tokens, width, dtype):
    check_swiglu(tokens, width, dtype)


@DTYPES
@pytest.mark.parametrize(("tokens", "width", "rank"), [(1, 1, 1), (33, 130, 8), (5, 77, 5), (40, 64, 64)])
@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)], ids=["gate", "up", "both"])
def test_swiglu_adds_the_adapters_of_gate_and_up_as_if_they_were_there(tokens, width, rank, present, dtype):
    check_swiglu_lora(tokens, width, present, rank, dtype)


LORA_A = [(1, 1, 1, 1, 0.0), (33, 130, 3, 8, 0.1), (5, 70, 2, 5, 0.5), (9, 600, 3, 24, 0.0), (40, 64, 1, 64, 0.3)]


@DTYPES
@pytest.mark.parametrize("sizes", LORA_A)
def test_the_products_with_a_and_their_gradients_are_the_formulas(sizes, dtype):
    check_lora_a(*sizes, dtype)


def test_more_modules_and_higher_ranks_than_the_kernels_hold_are_computed_as_well():
    check_lora_a(6, 40, 4, 8, 0.2, torch.float32)
    check_lora_a(6, 40, 1, 65, 0.2, torch.float32)
    check_lora_b(3, [5, 4, 3, 2], [0, 1, 2, 3], 4, torch.float32)
    check_swiglu_lora(3, 40, (0, 1), 65, torch.float32)


LORA_B = [
    (1, [1], [0], 1),
    (65, [130, 16, 16], [0, 1, 2], 8),
    (7, [64, 32, 32], [0, 2], 16),
    (3, [40, 24, 24], [1], 3),
    (9, [96, 96], [0, 1], 64),
]


@DTYPES
@pytest.mark.parametrize("sizes", LORA_B)
def test_the_products_with_b_are_added_where_their_modules_are(sizes, dtype):
    check_lora_b(*sizes, dtype)


@pytest.mark.parametrize(("size", "max_norm"), [(1, 1.0), (1000, 0.5), (3001, 0.0)])
def test_adamw_is_torchs_with_its_clipping(size, max_norm):
    check_adamw(size, max_norm, steps=4)


def test_adamws_bias_correction_holds_after_a_thousand_steps():
    param, grad = torch.ones(3), torch.tensor([1.0, -2.0, 0.5])
    exp_avg, exp_avg_sq = grad.clone(), grad.square()
    adamw_step(param, grad, exp_avg, exp_avg_sq, 1000, 1e-3, (0.9, 0.999), 1e-8, 0.0, 0.0)
    want = 1 - 1e-3 * grad.double().sign() * math.sqrt(1 - 0.999**1000) / (1 - 0.9**1000)
    assert_close(param, want, torch.float32)


def test_no_tokens_give_no_rows():
    assert rmsnorm(torch.ones(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert swiglu(torch.ones(0, 8)).shape == (0, 4)
    assert swiglu_lora(torch.ones(0, 8), torch.ones(0, 2), [torch.ones(4, 2)], [4], 1.0).shape == (0, 4)
    assert lora_a(torch.ones(0, 8), torch.ones(2, 3, 8), 0.1, 0, [0, 1]).shape == (0, 6)


REFUSED = {
    "a weight of another size": lambda: rmsnorm(torch.ones(2, 4), torch.ones(3), EPS),
    "a weight of another type": lambda: rmsnorm(torch.ones(2, 4), torch.ones(4).bfloat16(), EPS),
    "another size to add": lambda: rmsnorm_backward(
        torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), EPS, plus=torch.ones(1, 4)
    ),
    "a delta of another size": lambda: add_rmsnorm(torch.ones(2, 4), torch.ones(1, 4), torch.ones(4), EPS),
    "tables of another width": lambda: rope(
        torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.ones(9, 4), torch.ones(9, 4), torch.zeros(2, dtype=torch.int64)
    ),
    "an odd width": lambda: swiglu(torch.ones(2, 3)),
    "an adapter of a half": lambda: swiglu_lora(torch.ones(2, 8), torch.ones(2, 1), [torch.ones(3, 1)], [0], 1.0),
    "up before gate": lambda: swiglu_lora(torch.ones(2, 4), torch.ones(2, 2), [torch.ones(2, 1)] * 2, [2, 0], 1.0),
    "a gradient of both": lambda: swiglu_lora_backward(
        torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 1), [torch.ones(2, 1)], [2], 1.0
    ),
    "p of one": lambda: dropout_mask(0, 0, (2, 2), 1.0),
    "p below zero": lambda: lora_a(torch.ones(2, 4), torch.ones(1, 2, 4), -0.1, 0, [0]),
    "a stream too few": lambda: lora_a(torch.ones(2, 4), torch.ones(2, 2, 4), 0.1, 0, [0]),
    "columns beyond y": lambda: add_lora_b(torch.ones(2, 4), torch.ones(2, 1), [torch.ones(3, 1)], [2], 1.0),
    "a float16 buffer": lambda: adamw_step(*[torch.ones(3).half()] * 4, 1, 0.1, (0.9, 0.99), 1e-8, 0.0, 1.0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    with pytest.raises(ValueError, match=r"must|do not fit|needs"):
        REFUSED[what]()


def test_the_interpreter_runs_the_kernels_and_nothing_else_does_on_a_cpu():
    assert runs_kernel(torch.ones(1)) is INTERPRETER


def test_norm_and_rope_are_transformers_own():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    for dtype in (torch.float32, torch.bfloat16):
        x, norm = torch.randn(7, 96).to(dtype), LlamaRMSNorm(96, eps=EPS).to(dtype)
        torch.nn.init.normal_(norm.weight, 1.0, 0.25)
        want = norm(x).detach()
        assert_close(rmsnorm(x, norm.weight.detach(), EPS), want.double(), dtype)
        assert INTERPRETER or torch.equal(rmsnorm(x, norm.weight.detach(), EPS), want)
    q, k, (cos, sin) = torch.randn(5, 4, 16), torch.randn(5, 2, 16), tables(5, 16)
    doubled = (torch.cat([t, t], -1)[None] for t in (cos, sin))
    want = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *doubled)
    rope(q, k, cos, sin, torch.arange(5))
    for got, expected in zip((q, k), want, strict=True):
        assert_close(got, expected[0].transpose(0, 1).double(), torch.float32)


@pytest.mark.skipif(INTERPRETER, reason="this is the inner process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which also interprets on a CPU")
def test_the_triton_kernels_pass_these_tests_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, str(MASKS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
