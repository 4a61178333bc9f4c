"""How the kernels are declared and started: Triton on NVIDIA GPUs, torch references everywhere else.

A kernel file holds formula, public function, torch reference and Triton kernels. Torch for CPUs comes without Triton,
so the kernels are then plain functions that nobody calls. With TRITON_INTERPRET=1 in the environment before the import,
Triton's interpreter runs them on CPU tensors, which is how the tests reach them without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
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
    if first.is_cuda:
        with torch.cuda.device(first.device):
            function[grid](first, *arguments, **options)
    else:
        function[grid](first, *arguments, **options)


def block(size: int, least: int = 16) -> int:
    """The power of two that holds `size` elements; tl.dot wants at least 16."""
    return max(least, 1 << (size - 1).bit_length())


@kernel()
def dot(a: Value, b: Value, total: Value) -> Any:
    """total + a @ b in float32; float32 operands are not rounded to TF32. The interpreter's own dot knows no bfloat16."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")
