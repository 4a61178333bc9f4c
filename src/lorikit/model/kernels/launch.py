"""How the kernels are declared and started: Triton on NVIDIA GPUs, torch references everywhere else.

A kernel file holds formula, public function, torch reference and Triton kernels. Torch for CPUs comes without Triton,
so the kernels are then plain functions that nobody calls. With TRITON_INTERPRET=1 in the environment before the import,
Triton's interpreter runs them on CPU tensors, which is how the tests reach them without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

_FOUND = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if _FOUND else None
tl: Any = importlib.import_module("triton.language") if _FOUND else None

# Annotations of kernel arguments. Triton looks them up, so they are its own: a tensor arrives as a pointer to its elements,
# a number or a tile as a value, and what is constexpr is known when the kernel is compiled.
if TYPE_CHECKING:
    Pointer = Any
    Value = Any
    constexpr = Any
else:
    Pointer = Value = getattr(tl, "tensor", None)
    constexpr = getattr(tl, "constexpr", None)

INTERPRETED = _FOUND and os.environ.get("TRITON_INTERPRET") == "1"
CAPTURING = threading.Lock()  # held while a CUDA graph is captured: two at a time break each other
_INTERPRETED: Any = tl.constexpr(INTERPRETED) if _FOUND else None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernel(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> bool:
    """Whether the Triton kernels take these tensors: all on a GPU (or interpreted), of `dtypes`, none empty."""
    return _FOUND and all((t.is_cuda or INTERPRETED) and t.dtype in dtypes and t.numel() > 0 for t in tensors)


def kernel(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare a Triton function; it is not compiled anew for other values of the arguments named in `varying`."""

    def declare(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=varying) if _FOUND else function

    return declare


def launch(function: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument, which need not be the current one."""
    if not first.is_cuda:
        function[grid](first, *arguments, **options)
    elif _ahead:
        _ahead[-1].add(function, grid, (first, *arguments), options)
    else:
        with torch.cuda.device(first.device):
            function[grid](first, *arguments, **options)


class Compiling:
    """The kernels that a computation will need, each compiled once, in threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
        self._jobs: dict[Any, Future[None]] = {}

    def add(self, function: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Have a launch compiled. Of tensors only the type is held on to, and that they are aligned, as most are."""
        device = arguments[0].device
        kinds = tuple(a.dtype if isinstance(a, Tensor) and a.data_ptr() % 16 == 0 else a for a in arguments)
        key = (function, device, tuple(_class_of(kind) for kind in kinds), tuple(sorted(options.items())))
        if key not in self._jobs:
            self._jobs[key] = self._pool.submit(_compile_next, function, grid, kinds, options, device)

    def finish(self) -> None:
        """Nothing more is added."""
        self._pool.shutdown(wait=False)

    def wait(self) -> None:
        """Until all are ready. Raises what the compiler raised."""
        for job in self._jobs.values():
            job.result()


def _class_of(argument: Any) -> Any:
    """Arguments of one class get the same kernel: Triton looks whether a number is 1 or divisible by 16, and at its size."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, abs(argument) < 2**31
    return argument if isinstance(argument, torch.dtype) else type(argument)


def _compile_next(
    function: Any, grid: tuple[int, ...], kinds: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> None:
    start_compiler(device).result()
    _compile(function, grid, kinds, options, device)


def _compile(
    function: Any, grid: tuple[int, ...], kinds: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> None:
    with torch.cuda.device(device):
        compiled = function.warmup(*kinds, grid=grid, **options)
        compiled.run  # noqa: B018  loads it, and compiles the C function that starts it


@cache
def start_compiler(device: torch.device) -> Future[None]:
    """Have Triton compile a kernel of no use, in a thread: before its first one it hashes all its own files, hundreds of
    megabytes, which takes seconds, and which each thread that compiles would do again until one of them is through."""
    pool = ThreadPoolExecutor(1)
    job = pool.submit(_compile, _nothing_kernel, (1,), (torch.float32,), {}, device)
    pool.shutdown(wait=False)
    return job


_ahead: list[Compiling] = []  # filled by compiling_ahead alone; the threads of autograd look at it too


@contextmanager
def compiling_ahead() -> Iterator[Compiling]:
    """Inside it kernels on a GPU are not started but compiled, at the same time; `wait` says when they are ready.

    What they would have written is then undefined, so this is for a rehearsal whose result nobody uses, and no other thread
    may start a kernel meanwhile. One after the other at their first use, the kernels of a training step take half a minute.
    """
    ahead = Compiling()
    _ahead.append(ahead)
    try:
        yield ahead
    finally:
        _ahead.remove(ahead)
        ahead.finish()


def block(size: int, least: int = 16) -> int:
    """The power of two that holds `size` elements; tl.dot wants at least 16."""
    return max(least, 1 << (size - 1).bit_length())


@kernel()
def dot(a: Value, b: Value, total: Value) -> Any:
    """total + a @ b in float32; float32 operands are not rounded to TF32. The interpreter's own dot knows no bfloat16."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@kernel()
def limit(number: Value) -> Any:
    """A number for `range`: the interpreter's takes no tensors."""
    if _INTERPRETED:
        return number.handle.data.item()
    return number


@kernel()
def _nothing_kernel(at: Pointer) -> None:
    tl.store(at, 0.0)
