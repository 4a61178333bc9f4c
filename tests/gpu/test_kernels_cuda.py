"""The Triton kernels on an NVIDIA GPU: the checks of tests/test_kernels.py at the shapes of Llama-3-8B, CPU and GPU masks
alike, and what only a GPU can show: graphs, sizes beyond 32 bits, the same bytes again."""

import math
import random

import pytest
import torch

from lorikit.model.kernels.cross_entropy import cross_entropy_gradient
from lorikit.model.kernels.dropout import dropout_mask
from lorikit.model.kernels.launch import runs_kernel
from lorikit.model.kernels.lora_a import lora_a, lora_a_backward
from lorikit.model.kernels.rmsnorm import rmsnorm
from lorikit.model.kernels.swiglu import swiglu
from test_kernels import (
    DTYPES,
    EPS,
    check_adamw,
    check_add_rmsnorm,
    check_lora_a,
    check_lora_b,
    check_rmsnorm,
    check_rope,
    check_swiglu,
    check_swiglu_lora,
    fresh_numbers,  # noqa: F401
)
from test_kernels_loss import check_cross_entropy

pytestmark = pytest.mark.gpu
TOKENS = pytest.mark.parametrize("tokens", [1, 129, 1042])


def test_the_kernels_run_on_this_gpu():
    assert runs_kernel(torch.ones(1, device="cuda"))


@DTYPES
@TOKENS
def test_the_norms_are_the_formulas(tokens, dtype):
    check_rmsnorm((tokens, 4096), dtype, "cuda")
    check_rmsnorm((tokens, 576), dtype, "cuda", strided=True)
    check_rmsnorm((tokens, 9, 128), dtype, "cuda", strided=True)
    check_rmsnorm((3, 16384), dtype, "cuda")
    check_add_rmsnorm(tokens, 4096, dtype, "cuda")


@DTYPES
@TOKENS
def test_rope_turns_and_turns_back(tokens, dtype):
    check_rope(tokens, 32, 8, 128, dtype, "cuda")
    check_rope(tokens, 9, 3, 64, dtype, "cuda")
    check_rope(tokens, 5, 5, 80, dtype, "cuda")


@DTYPES
@TOKENS
def test_swiglu_is_the_formula(tokens, dtype):
    check_swiglu(tokens, 14336, dtype, "cuda")
    check_swiglu(tokens, 77, dtype, "cuda")


@DTYPES
@TOKENS
@pytest.mark.parametrize("rank", [1, 8, 24, 64])
@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)], ids=["gate", "up", "both"])
def test_swiglu_with_adapters_is_the_formula(tokens, rank, present, dtype):
    check_swiglu_lora(tokens, 14336, present, rank, dtype, "cuda")
    check_swiglu_lora(tokens, 77, present, rank, dtype, "cuda")


@DTYPES
@TOKENS
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("width", "modules", "rank"), [(4096, 3, 8), (4096, 2, 64), (14336, 1, 8), (577, 3, 5)])
def test_the_products_with_a_are_the_formulas(tokens, width, modules, rank, p, dtype):
    check_lora_a(tokens, width, modules, rank, p, dtype, "cuda")


@DTYPES
@TOKENS
@pytest.mark.parametrize("rank", [1, 8, 24, 64])
def test_the_products_with_b_are_the_formulas(tokens, rank, dtype):
    check_lora_b(tokens, [4096, 1024, 1024], [0, 1, 2], rank, dtype, "cuda")
    check_lora_b(tokens, [4096, 1024, 1024], [0, 2], rank, dtype, "cuda")
    check_lora_b(tokens, [77, 50], [1], rank, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("rows", [1, 427])
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_cross_entropy_is_the_formula(rows, scale, dtype):
    check_cross_entropy(rows, 128_256, dtype, "cuda", scale=scale)
    check_cross_entropy(rows, 32_001, dtype, "cuda", scale=scale, strided=True)
    check_cross_entropy(3, 151_936, dtype, "cuda", scale=scale, ignored=1.0)


@pytest.mark.parametrize(("size", "max_norm"), [(1, 1.0), (1_000_003, 0.5), (5_000_000, 0.0)])
def test_adamw_is_torchs(size, max_norm):
    check_adamw(size, max_norm, 4, "cuda")


@pytest.mark.parametrize("shape", [(1, 1), (1042, 4096), (7, 14336), (3, 5, 77)])
def test_a_mask_of_the_gpu_is_the_cpus_to_the_bit(shape):
    seed, stream = random.getrandbits(64), random.getrandbits(32)
    assert torch.equal(dropout_mask(seed, stream, shape, 0.1, "cuda").cpu(), dropout_mask(seed, stream, shape, 0.1))


def test_the_same_inputs_give_the_same_bytes_and_other_tokens_change_nothing():
    x, a = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((1042, 4096), (3, 8, 4096)))
    first = lora_a(x, a, 0.1, 1, [0, 1, 2])
    assert torch.equal(lora_a(x, a, 0.1, 1, [0, 1, 2]), first)
    assert torch.equal(lora_a(x[:500], a, 0.1, 1, [0, 1, 2]), first[:500])
    backward = [lora_a_backward(first, x, a, 0.1, 1, [0, 1, 2]) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*backward, strict=True))


def test_a_captured_kernel_reads_its_seed_anew():
    x, a = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((65, 256), (2, 8, 256)))
    seed = torch.tensor(1, device="cuda")

    def run():
        return lora_a(x, a, 0.5, seed, [3, 4])

    run()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for number in range(1, 4):
        seed.fill_(100 * number)
        graph.replay()
        assert torch.equal(captured, lora_a(x, a, 0.5, 100 * number, [3, 4]))


def test_tensors_of_more_than_two_to_the_31_elements():
    x = torch.ones(80_000, 28_672, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2
    y = swiglu(x)
    for row, value in ((-2, 1.0), (-1, 2.0)):
        want = torch.nn.functional.silu(torch.tensor(value)).item() * value
        assert (y[row].float() - want).abs().max() < 1e-2
    del y
    normed = rmsnorm(x, torch.ones(28_672, dtype=torch.bfloat16, device="cuda"), EPS)
    assert (normed[-1].float() - 1).abs().max() < 1e-2
    del normed
    losses = cross_entropy_gradient(x, torch.full((80_000,), 28_671, device="cuda"))
    assert (losses - math.log(28_672)).abs().max() < 1e-4
    assert (x[-1, -1].item(), x[-1, 0].item()) == pytest.approx((-1.0, 1 / 28_672), rel=1e-2)
