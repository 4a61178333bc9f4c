"""Time every kernel at the shapes of Llama-3-8B with LoRA r 8, beside the limit of the GPU's memory and plain torch.

    python benchmarks/kernel_times.py [--tokens 1042 4096] [--only lora] [--json FILE]

All of them are bound by memory: GB/s count each input once and each output once, whatever a kernel really moves, and the
share is of the nominal bandwidth of the GPU (H100 SXM: 3.35 TB/s); the first line, a copy, shows what of it can be reached.
Each is checked against its float32 reference first. Times are those of a CUDA graph of the kernel on many sets of tensors,
200 MB together, so that neither launches nor the cache (50 MB) flatter them. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorikit.model.kernels import adamw, dropout, lora_a, lora_b, rmsnorm, rope, swiglu
from lorikit.model.kernels.launch import runs_kernel

HIDDEN, FFN, HEADS, KV_HEADS, HEAD, RANK = 4096, 14336, 32, 8, 128, 8
QKV = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
ADAPTER = 20_971_520  # parameters of r 8 on all seven linears of 32 layers
EPS, P, SEED, SCALE = 1e-5, 0.1, 12345, 4.0
NOMINAL = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # bytes a second
TRAFFIC, REPLAYS = 200e6, 15


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one set of tensors. `run` and `plain` return what they computed, `want` the same in float32."""

    run: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], object]
    want: Callable[[], tuple[Tensor, ...]]
    num_bytes: int
    dtype: torch.dtype = torch.bfloat16
    """Of its inputs: float32 sums of bfloat16 products are held to bfloat16."""


def main() -> None:
    arguments = parse()
    assert torch.cuda.is_available(), "this measures an NVIDIA GPU; there is none"
    assert runs_kernel(torch.ones(1, device="cuda")), "Triton is not installed: the references would be measured"
    name = torch.cuda.get_device_name()
    nominal = next((value for key, value in NOMINAL.items() if key in name), math.nan)
    begun = time.perf_counter()
    results = []
    print(f"{'kernel':34}{'tokens':>7}{'us':>9}{'GB/s':>7}{'share':>7}{'torch us':>10}{'first call s':>14}")
    for tokens in arguments.tokens:
        for title, make in CASES.items():
            if arguments.only in title and not (title == "adamw_step" and tokens != arguments.tokens[0]):
                results.append({"kernel": title, "tokens": tokens} | attempt(make, tokens, nominal))
                print(line(results[-1]), flush=True)
    record = {
        "device": name,
        "nominal_tb_per_second": nominal / 1e12,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "triton")},
        "seconds": round(time.perf_counter() - begun, 1),
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))
    if any("failed" in result for result in results):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1042, 4096])
    parser.add_argument("--only", default="", help="measure the kernels with this in their name")
    parser.add_argument("--json", type=Path, help="write the record there as well")
    return parser.parse_args()


def attempt(make: Callable[[int], Case], tokens: int, nominal: float) -> dict[str, Any]:
    """What was measured, or what failed: the others are measured all the same, and the exit code tells."""
    try:
        return measure(make, tokens, nominal)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def line(result: dict[str, Any]) -> str:
    start = f"{result['kernel']:34}{result['tokens']:7}"
    if "failed" in result:
        return f"{start}  FAILED {result['failed'][-300:]}"
    rate, share = f"{result['gb_per_second']:7}", f"{result['share']:7.0%}"
    return f"{start}{result['us']:9.1f}{rate}{share}{result['torch_us']:10.1f}{result['first_call_seconds']:14.2f}"


def measure(make: Callable[[int], Case], tokens: int, nominal: float) -> dict[str, float]:
    torch.manual_seed(0)
    case = make(tokens)
    want = case.want()
    started = time.perf_counter()
    got = case.run()
    torch.cuda.synchronize()
    first = time.perf_counter() - started  # compiles, where the cache on disk does not have it
    check(got, want, case.dtype)
    del got, want
    cases = [case, *(make(tokens) for _ in range(math.ceil(TRAFFIC / case.num_bytes)))]
    seconds = graph_seconds([c.run for c in cases])
    plain = graph_seconds([c.plain for c in cases])
    rate = case.num_bytes / seconds
    return {
        "us": round(seconds * 1e6, 2),
        "gb_per_second": round(rate / 1e9),
        "share": round(rate / nominal, 3),
        "torch_us": round(plain * 1e6, 2),
        "first_call_seconds": round(first, 2),
    }


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Within a few roundings of the largest value, as in the tests; masks to the bit."""
    assert len(got) == len(want)
    for ours, exact in zip(got, want, strict=True):
        if ours.dtype == torch.bool:
            assert torch.equal(ours, exact), "the mask differs"
            continue
        error, largest = (ours.float() - exact).abs().max().item(), exact.abs().max().item()
        assert math.isfinite(largest) and largest > 0, "the reference is not finite, or nothing but zeros"
        bound = 8 * max(torch.finfo(ours.dtype).eps, torch.finfo(dtype).eps) * largest
        assert error <= bound, f"off by {error:.2e}, allowed are {bound:.2e}"


def graph_seconds(calls: list[Callable[[], object]]) -> float:
    """Seconds of one call: the median of replays of all of them in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times[3:])


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def copy(tokens: int) -> Case:
    source = random(tokens, FFN)
    target = torch.empty_like(source)
    run = lambda: (target.copy_(source),)  # noqa: E731
    return Case(run, run, lambda: (source.float(),), bytes_of(source, target))


def norm(tokens: int) -> Case:
    x, w = random(tokens, HIDDEN), random(HIDDEN)
    return Case(
        lambda: (rmsnorm.rmsnorm(x, w, EPS),),
        lambda: rmsnorm.rmsnorm_reference(x, w, EPS),
        lambda: (rmsnorm.rmsnorm_reference(x.float(), w.float(), EPS),),
        bytes_of(x, x),
    )


def sum_and_norm(tokens: int) -> Case:
    x, delta, w = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)

    def want() -> tuple[Tensor, ...]:
        total = x.float() + delta.float()
        return total, rmsnorm.rmsnorm_reference(total, w.float(), EPS)

    def plain() -> Tensor:
        return rmsnorm.rmsnorm_reference(x + delta, w, EPS)

    return Case(lambda: rmsnorm.add_rmsnorm(x, delta, w, EPS), plain, want, 2 * bytes_of(x, delta))


def norm_backward_added(tokens: int) -> Case:
    grad, x, plus = (random(tokens, HIDDEN) for _ in range(3))
    w = random(HIDDEN)
    return Case(
        lambda: (rmsnorm.rmsnorm_backward(grad, x, w, EPS, plus=plus),),
        lambda: plus + rmsnorm.rmsnorm_backward_reference(grad, x, w, EPS),
        lambda: (plus.float() + rmsnorm.rmsnorm_backward_reference(grad.float(), x.float(), w.float(), EPS),),
        bytes_of(grad, x, plus, plus),
    )


def turn(tokens: int) -> Case:
    fused = random(tokens, HEADS + 2 * KV_HEADS, HEAD)
    q, k = fused[:, :HEADS], fused[:, HEADS : HEADS + KV_HEADS]
    angles = torch.arange(8192)[:, None] * (500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
    cos, sin = angles.cos().cuda(), angles.sin().cuda()
    positions = torch.arange(tokens, device="cuda")

    def run() -> tuple[Tensor, ...]:
        rope.rope(q, k, cos, sin, positions)
        return q, k

    def plain() -> None:
        for x in (q, k):
            rope.rope_reference(x, cos, sin, positions)

    def want() -> tuple[Tensor, ...]:
        wide = q.float(), k.float()
        for x in wide:
            rope.rope_reference(x, cos, sin, positions)
        return wide

    return Case(run, plain, want, 2 * bytes_of(q, k))


def gate(tokens: int) -> Case:
    x = random(tokens, 2 * FFN)
    return Case(
        lambda: (swiglu.swiglu(x),),
        lambda: swiglu.swiglu_reference(x),
        lambda: (swiglu.swiglu_reference(x.float()),),
        bytes_of(x) * 3 // 2,
    )


def gate_backward(tokens: int) -> Case:
    grad, x = random(tokens, FFN), random(tokens, 2 * FFN)
    return Case(
        lambda: (swiglu.swiglu_backward(grad, x),),
        lambda: swiglu.swiglu_backward_reference(grad, x),
        lambda: (swiglu.swiglu_backward_reference(grad.float(), x.float()),),
        bytes_of(grad, x, x),
    )


def mask(tokens: int) -> Case:
    def plain() -> Tensor:
        return torch.rand(tokens, HIDDEN, device="cuda") >= P

    return Case(
        lambda: (dropout.dropout_mask(SEED, 7, (tokens, HIDDEN), P, "cuda"),),
        plain,
        lambda: (dropout.dropout_mask_reference(SEED, 7, (tokens, HIDDEN), P, "cuda"),),
        tokens * HIDDEN,
    )


def down_projection(modules: int, width: int) -> Callable[[int], Case]:
    """A of some modules that read one x."""

    def make(tokens: int) -> Case:
        x, a = random(tokens, width), random(modules, RANK, width, scale=width**-0.5)
        rest = (P, torch.tensor(SEED, device="cuda"), range(modules))
        plain = (P, SEED, range(modules))
        return Case(
            lambda: (lora_a.lora_a(x, a, *rest),),
            lambda: lora_a.lora_a_reference(x, a, *plain),
            lambda: (lora_a.lora_a_reference(x.float(), a.float(), *plain),),
            bytes_of(x, a),
        )

    return make


def down_projection_backward(modules: int, width: int) -> Callable[[int], Case]:
    """Its gradient, added to the one that x already has."""

    def make(tokens: int) -> Case:
        x, a = random(tokens, width), random(modules, RANK, width, scale=width**-0.5)
        grad, grad_x = random(tokens, modules * RANK), random(tokens, width)
        rest = (P, torch.tensor(SEED, device="cuda"), range(modules))
        plain = (P, SEED, range(modules))

        def run() -> tuple[Tensor, ...]:
            into, grad_a = lora_a.lora_a_backward(grad, x, a, *rest, grad_x)
            assert into is not None
            return into, grad_a

        def want() -> tuple[Tensor, ...]:
            into, grad_a = lora_a.lora_a_backward_reference(grad.float(), x.float(), a.float(), *plain, grad_x.float())
            assert into is not None
            return into, grad_a

        return Case(
            run,
            lambda: lora_a.lora_a_backward_reference(grad, x, a, *plain, grad_x),
            want,
            bytes_of(x, a, grad, grad_x, grad_x) + 2 * bytes_of(a),
        )

    return make


def up_projection(sizes: list[int]) -> Callable[[int], Case]:
    """B of all modules of one fused product."""

    def make(tokens: int) -> Case:
        y, u = random(tokens, sum(sizes)), random(tokens, len(sizes) * RANK)
        b, starts = [random(size, RANK) for size in sizes], [sum(sizes[:m]) for m in range(len(sizes))]

        def run() -> tuple[Tensor, ...]:
            lora_b.add_lora_b(y, u, b, starts, SCALE)
            return (y,)

        def want() -> tuple[Tensor, ...]:
            wide = y.float()
            lora_b.add_lora_b_reference(wide, u.float(), [matrix.float() for matrix in b], starts, SCALE)
            return (wide,)

        return Case(run, lambda: lora_b.add_lora_b_reference(y, u, b, starts, SCALE), want, bytes_of(y, y, u, *b))

    return make


def up_projection_backward(sizes: list[int]) -> Callable[[int], Case]:
    """Its gradients: products of cuBLAS, no kernel of ours."""

    def make(tokens: int) -> Case:
        grad, u = random(tokens, sum(sizes)), random(tokens, len(sizes) * RANK)
        b, starts = [random(size, RANK) for size in sizes], [sum(sizes[:m]) for m in range(len(sizes))]

        def run() -> tuple[Tensor, ...]:
            grad_u, grad_b = lora_b.lora_b_backward(grad, u, b, starts, SCALE)
            return grad_u, *grad_b

        def want() -> tuple[Tensor, ...]:
            wide = [matrix.float() for matrix in b]
            grad_u, grad_b = lora_b.lora_b_backward(grad.float(), u.float(), wide, starts, SCALE)
            return grad_u, *grad_b

        return Case(run, run, want, bytes_of(grad, u, u, *b) + 2 * bytes_of(*b))

    return make


def optimizer(_: int) -> Case:
    param, grad, exp_avg = (torch.randn(ADAPTER, device="cuda") / 100 for _ in range(3))
    exp_avg_sq = exp_avg.square()
    rest = (4, 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0)

    def run() -> tuple[Tensor, ...]:
        norm = adamw.adamw_step(param, grad, exp_avg, exp_avg_sq, *rest)
        return param, exp_avg, exp_avg_sq, norm

    def want() -> tuple[Tensor, ...]:
        state = param.clone(), grad, exp_avg.clone(), exp_avg_sq.clone()
        norm = adamw.adamw_reference(*state, *rest, 1, torch.zeros((), device="cuda"))
        return state[0], state[2], state[3], norm

    def plain() -> Tensor:
        return adamw.adamw_reference(param, grad, exp_avg, exp_avg_sq, *rest, 1, torch.zeros((), device="cuda"))

    num_bytes = 2 * bytes_of(param, exp_avg, exp_avg_sq) + bytes_of(grad, copy)
    return Case(run, plain, want, num_bytes, torch.float32)


CASES: dict[str, Callable[[int], Case]] = {
    "copy (torch)": copy,
    "rmsnorm": norm,
    "add_rmsnorm": sum_and_norm,
    "rmsnorm_backward, added": norm_backward_added,
    "rope": turn,
    "swiglu": gate,
    "swiglu_backward": gate_backward,
    "dropout_mask": mask,
    "lora_a q k v": down_projection(3, HIDDEN),
    "lora_a gate up": down_projection(2, HIDDEN),
    "lora_a o": down_projection(1, HIDDEN),
    "lora_a down": down_projection(1, FFN),
    "lora_a_backward q k v, added": down_projection_backward(3, HIDDEN),
    "lora_a_backward gate up, added": down_projection_backward(2, HIDDEN),
    "lora_a_backward down, added": down_projection_backward(1, FFN),
    "add_lora_b q k v": up_projection(QKV),
    "add_lora_b gate up": up_projection([FFN, FFN]),
    "add_lora_b down": up_projection([HIDDEN]),
    "lora_b_backward q k v (cuBLAS)": up_projection_backward(QKV),
    "lora_b_backward gate up (cuBLAS)": up_projection_backward([FFN, FFN]),
    "adamw_step": optimizer,
}


if __name__ == "__main__":
    main()
