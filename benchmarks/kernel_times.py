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

from lorikit.model.kernels import adamw, cross_entropy, dropout, lora_a, lora_b, rmsnorm, rope, swiglu, swiglu_lora
from lorikit.model.kernels.launch import runs_kernel

HIDDEN, FFN, HEADS, KV_HEADS, HEAD, RANK = 4096, 14336, 32, 8, 128, 8
QKV = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
ADAPTER = 20_971_520  # parameters of r 8 on all seven linears of 32 layers
VOCABULARY = 128_256
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


def case(kernel: Callable[..., Any], reference: Callable[..., Any], num_bytes: int, *arguments: Any) -> Case:
    """Of functions of the same arguments; those that write over some return them."""
    return Case(
        lambda: flat(kernel(*arguments)),
        lambda: reference(*arguments),
        lambda: flat(reference(*map(wide, arguments))),
        num_bytes,
    )


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for part in result for t in flat(part))


def wide(argument: Any) -> Any:
    """Tensors of bfloat16 as copies in float32, everything else as it is."""
    if isinstance(argument, list):
        return [wide(part) for part in argument]
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def copy(tokens: int) -> Case:
    source = random(tokens, FFN)
    target = torch.empty_like(source)
    run = lambda: (target.copy_(source),)  # noqa: E731
    return Case(run, run, lambda: (source.float(),), bytes_of(source, target))


def norm(tokens: int) -> Case:
    x, w = random(tokens, HIDDEN), random(HIDDEN)
    return case(rmsnorm.rmsnorm, rmsnorm.rmsnorm_reference, bytes_of(x, x), x, w, EPS)


def sum_and_norm(tokens: int) -> Case:
    x, delta, w = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)

    def reference(x: Tensor, delta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        total = x + delta
        return total, rmsnorm.rmsnorm_reference(total, *rest)

    return case(rmsnorm.add_rmsnorm, reference, 2 * bytes_of(x, delta), x, delta, w, EPS)


def norm_backward_added(tokens: int) -> Case:
    grad, x, plus = (random(tokens, HIDDEN) for _ in range(3))

    def reference(*arguments: Any) -> Tensor:
        return arguments[-1] + rmsnorm.rmsnorm_backward_reference(*arguments[:-1])

    return case(rmsnorm.rmsnorm_backward, reference, bytes_of(grad, x, plus, plus), grad, x, random(HIDDEN), EPS, plus)


def turn(tokens: int) -> Case:
    fused = random(tokens, HEADS + 2 * KV_HEADS, HEAD)
    q, k = fused[:, :HEADS], fused[:, HEADS : HEADS + KV_HEADS]
    angles = torch.arange(8192)[:, None] * (500000.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
    rest = angles.cos().cuda(), angles.sin().cuda(), torch.arange(tokens, device="cuda")

    def kernel(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        rope.rope(q, k, *rest)
        return q, k

    def reference(*both: Tensor) -> tuple[Tensor, ...]:
        for x in both:
            rope.rope_reference(x, *rest)
        return both

    return case(kernel, reference, 2 * bytes_of(q, k), q, k)


def gate(tokens: int) -> Case:
    x = random(tokens, 2 * FFN)
    return case(swiglu.swiglu, swiglu.swiglu_reference, bytes_of(x) * 3 // 2, x)


def gate_backward(tokens: int) -> Case:
    grad, x = random(tokens, FFN), random(tokens, 2 * FFN)
    return case(swiglu.swiglu_backward, swiglu.swiglu_backward_reference, bytes_of(grad, x, x), grad, x)


def gate_with_adapters(tokens: int) -> Case:
    x, z, b = random(tokens, 2 * FFN), random(tokens, 2 * RANK), [random(FFN, RANK) for _ in range(2)]
    kernel, reference = swiglu_lora.swiglu_lora, swiglu_lora.swiglu_lora_reference
    return case(kernel, reference, bytes_of(x, z, *b) + bytes_of(x) // 2, x, z, b, [0, FFN], SCALE)


def gate_with_adapters_backward(tokens: int) -> Case:
    grad, x, z = random(tokens, FFN), random(tokens, 2 * FFN), random(tokens, 2 * RANK)
    b = [random(FFN, RANK) for _ in range(2)]
    kernel, reference = swiglu_lora.swiglu_lora_backward, swiglu_lora.swiglu_lora_backward_reference
    return case(kernel, reference, bytes_of(grad, x, x, z, *b), grad, x, z, b, [0, FFN], SCALE)


def loss(rows: int) -> Case:
    """And its gradient, which is written over the logits."""
    logits, targets = random(rows, VOCABULARY), torch.arange(rows, device="cuda")

    def with_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda logits, targets: (function(logits, targets), logits)

    kernel, reference = cross_entropy.cross_entropy_gradient, cross_entropy.cross_entropy_gradient_reference
    return case(with_gradient(kernel), with_gradient(reference), 2 * bytes_of(logits), logits, targets)


def mask(tokens: int) -> Case:
    rest = SEED, 7, (tokens, HIDDEN), P, "cuda"
    return Case(
        lambda: (dropout.dropout_mask(*rest),),
        lambda: torch.rand(tokens, HIDDEN, device="cuda") >= P,
        lambda: (dropout.dropout_mask_reference(*rest),),
        tokens * HIDDEN,
    )


def down_projection(modules: int, width: int) -> Callable[[int], Case]:
    """A of some modules that read one x."""

    def make(tokens: int) -> Case:
        x, a = random(tokens, width), random(modules, RANK, width, scale=width**-0.5)
        seed = torch.tensor(SEED, device="cuda")
        return case(
            lambda x, a: lora_a.lora_a(x, a, P, seed, range(modules)),
            lambda x, a: lora_a.lora_a_reference(x, a, P, SEED, range(modules)),
            bytes_of(x, a),
            *(x, a),
        )

    return make


def down_projection_backward(modules: int, width: int) -> Callable[[int], Case]:
    """Its gradient, added to the one that x already has."""

    def make(tokens: int) -> Case:
        x, a = random(tokens, width), random(modules, RANK, width, scale=width**-0.5)
        grad, into = random(tokens, modules * RANK), random(tokens, width)
        seed = torch.tensor(SEED, device="cuda")
        return case(
            lambda *given: lora_a.lora_a_backward(*given[:3], P, seed, range(modules), given[3]),
            lambda *given: lora_a.lora_a_backward_reference(*given[:3], P, SEED, range(modules), given[3]),
            bytes_of(x, a, grad, into, into) + 2 * bytes_of(a),
            *(grad, x, a, into),
        )

    return make


def up_projection(sizes: list[int]) -> Callable[[int], Case]:
    """B of all modules of one fused product."""

    def changed(function: Callable[..., None]) -> Callable[..., Tensor]:
        def call(y: Tensor, *rest: Any) -> Tensor:
            function(y, *rest)
            return y

        return call

    def make(tokens: int) -> Case:
        y, u = random(tokens, sum(sizes)), random(tokens, len(sizes) * RANK)
        b, starts = [random(size, RANK) for size in sizes], [sum(sizes[:m]) for m in range(len(sizes))]
        kernel, reference = changed(lora_b.add_lora_b), changed(lora_b.add_lora_b_reference)
        return case(kernel, reference, bytes_of(y, y, u, *b), y, u, b, starts, SCALE)

    return make


def up_projection_backward(sizes: list[int]) -> Callable[[int], Case]:
    """Its gradients."""

    def make(tokens: int) -> Case:
        grad, u = random(tokens, sum(sizes)), random(tokens, len(sizes) * RANK)
        b, starts = [random(size, RANK) for size in sizes], [sum(sizes[:m]) for m in range(len(sizes))]
        kernel, reference = lora_b.lora_b_backward, lora_b.lora_b_backward_reference
        return case(kernel, reference, bytes_of(grad, u, u, *b) + 2 * bytes_of(*b), grad, u, b, starts, SCALE)

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

    return Case(run, plain, want, 2 * bytes_of(param, exp_avg, exp_avg_sq) + bytes_of(grad), torch.float32)


CASES: dict[str, Callable[[int], Case]] = {
    "copy (torch)": copy,
    "rmsnorm": norm,
    "add_rmsnorm": sum_and_norm,
    "rmsnorm_backward, added": norm_backward_added,
    "rope": turn,
    "swiglu": gate,
    "swiglu_backward": gate_backward,
    "swiglu_lora": gate_with_adapters,
    "swiglu_lora_backward": gate_with_adapters_backward,
    "cross_entropy_gradient": loss,
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
    "lora_b_backward q k v": up_projection_backward(QKV),
    "lora_b_backward gate up": up_projection_backward([FFN, FFN]),
    "adamw_step": optimizer,
}


if __name__ == "__main__":
    main()
