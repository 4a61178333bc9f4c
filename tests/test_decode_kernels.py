"""The kernels of decoding against plain formulas in float64, as torch references and in Triton's interpreter."""

import pytest
import torch

from interpreter import assert_passes_in_the_interpreter
from lorikit.model.kernels import decode_attention as attention
from lorikit.model.kernels.decode_attention import decode_attention, store_turned
from lorikit.model.kernels.launch import runs_kernel
from lorikit.model.kernels.row_lora import Stack, add_row_lora, one_row
from test_kernels import DTYPES, INTERPRETER, assert_close, fresh_numbers  # noqa: F401  the fixture is used by all

# rows, heads, kv heads, head dim, positions, slots, window
ATTENTION = [(1, 1, 1, 1, 1, 1, 0), (3, 4, 2, 8, 40, 5, 0), (2, 6, 3, 24, 150, 4, 17), (1, 8, 1, 16, 300, 2, 0)]
# rows, inputs, outputs of the modules, rank, adapters
LORA = [(1, 1, (1,), 1, 1), (4, 30, (20, 8, 8), 4, 3), (2, 1100, (70, 50), 3, 2), (1, 600, (24, 8, 8), 16, 2)]


def check_attention(rows, heads, kv_heads, width, positions, slots, window, dtype, device="cpu"):
    keys, values = torch.randn(2, slots, kv_heads, positions, width, device=device).to(dtype)
    slot = torch.randperm(slots, device=device)[:rows]
    newest = torch.randint(0, positions, (rows,), device=device)
    newest[0] = positions - 1
    q = torch.randn(rows, (heads + 3) * width, device=device).to(dtype).view(rows, -1, width)[:, 1 : heads + 1]
    want = []
    for r in range(rows):
        first = max(0, int(newest[r]) + 1 - window) if window else 0
        seen = slice(first, int(newest[r]) + 1)
        k, v = (t[slot[r], :, seen].double().repeat_interleave(heads // kv_heads, 0) for t in (keys, values))
        weights = (k @ q[r].double()[..., None] * width**-0.5).softmax(1)
        want.append((weights * v).sum(1))
    got = decode_attention(q, keys, values, slot, newest, width**-0.5, window)
    assert_close(got, torch.stack(want), dtype, typical=1.0)


def check_store(rows, heads, kv_heads, half, dtype, device="cpu"):
    keys, values = torch.zeros(2, rows + 1, kv_heads, 9, 2 * half, device=device).to(dtype)
    slot, at = torch.randperm(rows + 1, device=device)[:rows], torch.randint(0, 9, (rows,), device=device)
    qkv = torch.randn(rows, heads + 2 * kv_heads, 2 * half, device=device).to(dtype)
    angles = torch.randn(9, half, device=device)
    c, s = angles.cos().double()[at][:, None], angles.sin().double()[at][:, None]
    first, second = qkv.double().chunk(2, 2)
    turned = torch.cat([first * c - second * s, second * c + first * s], 2)
    v = qkv[:, heads + kv_heads :].clone()
    store_turned(*torch.split(qkv, [heads, kv_heads, kv_heads], 1), angles.cos(), angles.sin(), at, slot, keys, values)
    assert_close(qkv[:, :heads], turned[:, :heads], dtype)
    assert_close(keys[slot, :, at], turned[:, heads : heads + kv_heads], dtype)
    assert torch.equal(values[slot, :, at], v)
    assert int((keys != 0).any(3).sum()) == rows * kv_heads, "nothing else was written"


def check_row_lora(rows, inputs, modules, rank, adapters, dtype, device="cpu"):
    def random(*size):
        return torch.randn(*size, device=device).to(dtype)

    outputs, starts = sum(modules), tuple(sum(modules[:m]) for m in range(len(modules)))
    a, b = random(adapters + 1, len(modules) * rank, inputs), random(adapters + 1, outputs, rank)
    stack = Stack(a, b, torch.rand(adapters + 1, device=device), starts)
    chosen = (torch.arange(rows, device=device) + (rows == 1)) % (adapters + 1)
    x, weight, bias = random(rows, inputs), random(outputs, inputs), random(outputs)
    more = torch.zeros(rows, outputs, dtype=torch.float64, device=device)
    for row, n in enumerate(chosen.tolist()):
        for m, (start, size) in enumerate(zip(starts, modules, strict=True)):
            z = a[n, m * rank : (m + 1) * rank].double() @ x[row].double()
            more[row, start : start + size] = stack.scales[n].double() * (b[n, start : start + size].double() @ z)
        if n == 0:
            more[row] = 0
    y = random(rows, outputs)
    want = y.double() + more
    add_row_lora(y, x, stack, chosen)
    typical = float((inputs * rank) ** 0.5)
    assert_close(y, want, dtype, typical)
    product = x.double() @ weight.double().t()
    if rows == 1:
        assert_close(one_row(x, weight, bias, stack, chosen), product + bias.double() + more, dtype, typical)
        assert_close(one_row(x, weight, None, None, chosen), product, dtype, typical)


@DTYPES
@pytest.mark.parametrize("sizes", ATTENTION)
def test_attention_over_the_cache_is_the_formula(sizes, dtype):
    check_attention(*sizes, dtype)


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 4, 2, 8), (2, 3, 3, 6)])
def test_keys_and_values_go_to_their_place(sizes, dtype):
    check_store(*sizes, dtype)


@DTYPES
@pytest.mark.parametrize("sizes", LORA)
def test_each_row_has_its_own_adapter(sizes, dtype):
    check_row_lora(*sizes, dtype)


@pytest.mark.skipif(not INTERPRETER, reason="the reference knows no such rows")
def test_rows_that_belong_to_nobody_change_nothing():
    keys, values = torch.randn(2, 2, 1, 70, 16)
    before = keys.clone()
    qkv, tables = torch.randn(2, 4, 16), torch.randn(70, 8)
    slot, at = torch.tensor([1, 2]), torch.tensor([3, 69])
    store_turned(*torch.split(qkv, [2, 1, 1], 1), tables, tables, at, slot, keys, values)
    out = decode_attention(qkv[:, :2], keys, values, slot, at, 0.25)
    assert torch.equal(out[1], torch.zeros(2, 16))
    assert int((keys != before).any(3).sum()) == 1


def test_positions_are_split_until_the_device_is_full_and_no_further():
    assert attention._splits(8, 8192) == 32
    assert attention._splits(8, 130) == 2
    assert attention._splits(8 * 64, 8192) == 1
    assert attention._splits(64, 8192) == 8


@pytest.mark.skipif(INTERPRETER, reason="this one starts it")
def test_the_kernels_pass_the_same_tests_in_the_interpreter():
    pytest.importorskip("triton")
    assert runs_kernel(torch.ones(1)) is False
    assert_passes_in_the_interpreter(__file__)
