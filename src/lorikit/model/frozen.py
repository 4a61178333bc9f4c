"""The frozen weight W (O, I) of linear layers, dense or quantised: what it multiplies, and how it is filled from files.

    forward          y = x W^T + bias        input_gradient   grad_x = grad W        w[a:b]   rows a to b of W

    none   W as it is in the base's type                                 2 bytes a weight in bfloat16
           (packed: in the order that a CPU wants it)
    fp8    W_oi = s_o w_oi, w in e4m3, one float32 scale a row           1 byte; products in 8 bits (kernels/fp8.py)
    nf4    QLoRA's (arXiv 2305.14314): 4-bit codes of a normal           0.516 bytes; W is dense for one product at a time
           distribution, a scale for 64 of them, itself in 8 bits

Nothing of several matrices is needed to quantise one, so each is quantised as it comes from its file, on the device, and
a dense copy of a whole layer never exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorikit.errors import ConfigError, ModelError
from lorikit.model.kernels.fp8 import FP8, fp8_input_gradient, fp8_product, quantize_rows, transpose

NF4_BLOCK = 64  # weights that share a scale, as in QLoRA


class Frozen(Protocol):
    """A frozen weight (O, I), stacked from matrices with the same inputs."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, I) -> x W^T + bias (T, O) in x's dtype."""
        ...

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad (T, O) -> grad W (T, I) in grad's dtype."""
        ...

    def dense(self) -> Tensor:
        """W (O, I) in the base's dtype."""
        ...

    def places(self) -> list[Place]:
        """Where each of the stacked matrices is put, in their order."""
        ...

    def __getitem__(self, rows: slice) -> Frozen: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of this shape belongs. `put` takes it from any device, in any dtype, and may be called by any thread."""

    shape: tuple[int, ...]
    put: Callable[[Tensor], object]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """A place that is a tensor of its own, or rows of one."""
        return cls(tuple(tensor.shape), tensor.copy_)


@dataclass(frozen=True, slots=True)
class Dense:
    """W as it is: `weight` (O, I)."""

    weight: Tensor
    rows: tuple[int, ...]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, I) -> x W^T + bias (T, O)."""
        return linear(x, self.weight, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad (T, O) -> grad W (T, I)."""
        return grad @ self.weight

    def dense(self) -> Tensor:
        """W itself."""
        return self.weight

    def places(self) -> list[Place]:
        """Rows of the weight."""
        return [Place.of(part) for part in torch.split(self.weight, list(self.rows))]

    def __getitem__(self, rows: slice) -> Dense:
        return Dense(self.weight[rows], self.rows[_matrices(self.rows, rows)])


@dataclass(frozen=True, slots=True)
class Packed:
    """W on a CPU in the blocks that oneDNN multiplies with: a few rows in the time that reading W takes, where MKL takes
    several times that. `weight` holds all of the stacked `rows`, of which those in `kept` are wanted (None: all)."""

    weight: Tensor
    rows: tuple[int, ...]
    kept: slice | None = None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, I) -> x W^T + bias (T, O), without a graph."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        y = y if self.kept is None else y[:, self.kept]
        return y if bias is None else y.add_(bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad (T, O) -> grad W (T, I)."""
        return grad @ self.dense()

    def dense(self) -> Tensor:
        """W, a copy in rows."""
        whole = self.weight.to_dense()
        return whole if self.kept is None else whole[self.kept]

    def places(self) -> list[Place]:
        """None: it is made of a weight that is filled."""
        return []

    def __getitem__(self, rows: slice) -> Packed:
        assert self.kept is None, "rows of rows are nowhere asked for"
        _matrices(self.rows, rows)  # whole matrices
        return Packed(self.weight, self.rows, rows)


def packed(weight: Frozen) -> Frozen:
    """A dense weight on a CPU in oneDNN's blocks, where this torch has them for its type; else the weight as it is."""
    if not isinstance(weight, Dense) or not _packs(weight.weight):
        return weight
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight.weight, None), weight.rows)


@dataclass(frozen=True, slots=True)
class Fp8:
    """`values` (O, I) e4m3 and `scales` (O, 1) float32. Activations and gradients are quantised too, a row at a time.

    `turned` holds the values once more as (I, O) after `keep_turned`, else nothing, and they are transposed for each gradient.
    """

    values: Tensor
    scales: Tensor
    rows: tuple[int, ...]
    dtype: torch.dtype
    lock: Lock
    turned: list[Tensor] = field(default_factory=list)

    def keep_turned(self) -> None:
        """Have the values twice; before the places are filled."""
        self.turned.append(torch.empty(self.values.shape[::-1], dtype=FP8, device=self.values.device))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, I) -> x W^T + bias (T, O)."""
        y = fp8_product(x, self.values, self.scales)
        return y if bias is None else y.add_(bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad (T, O) -> grad W (T, I)."""
        return fp8_input_gradient(grad, self.values, self.scales, self.turned[0] if self.turned else None)

    def dense(self) -> Tensor:
        """W (O, I), each product of value and scale rounded once."""
        return (self.values.float() * self.scales).to(self.dtype)

    def places(self) -> list[Place]:
        """Rows of values and scales; every row has its own scale, so the matrices are as if quantised alone."""
        edges = list(pairwise(accumulate(self.rows, initial=0)))
        return [Place((end - start, self.values.shape[1]), self._put(slice(start, end))) for start, end in edges]

    def __getitem__(self, rows: slice) -> Fp8:
        kept = self.rows[_matrices(self.rows, rows)]
        return Fp8(self.values[rows], self.scales[rows], kept, self.dtype, self.lock)

    def _put(self, rows: slice) -> Callable[[Tensor], None]:
        def put(matrix: Tensor) -> None:
            on_device = matrix.to(self.values.device)
            with self.lock:
                quantised, largest = quantize_rows(on_device)
                self.values[rows].copy_(quantised)
                self.scales[rows].copy_(largest)
                for turned in self.turned:
                    turned[:, rows].copy_(transpose(quantised))

        return put


@dataclass(frozen=True, slots=True)
class Nf4:
    """Matrices of `rows` (each) x `inputs`, quantised one by one, as transformers does it; `places` fill `matrices` with
    codes and their QuantState.

    One is made dense for each product and let go after it, so that no two dense ones are alive.
    """

    rows: tuple[int, ...]
    inputs: int
    dtype: torch.dtype
    device: torch.device
    lock: Lock
    matrices: list[tuple[Tensor, Any] | None]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, I) -> x W^T + bias (T, O)."""
        return linear(x, self.dense(), bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad (T, O) -> grad W (T, I)."""
        return grad @ self.dense()

    def dense(self) -> Tensor:
        """W (O, I), a buffer of its own."""
        out = torch.empty((sum(self.rows), self.inputs), dtype=self.dtype, device=self.device)
        functional = bitsandbytes()
        for part, matrix in zip(torch.split(out, list(self.rows)), self.matrices, strict=True):
            assert matrix is not None, "its place was not filled"
            flat = part.view(1, -1)
            if part.is_cuda:
                functional.dequantize_4bit(*matrix, out=flat)
            else:  # elsewhere bitsandbytes only makes new tensors
                flat.copy_(functional.dequantize_4bit(*matrix))
        return out

    def places(self) -> list[Place]:
        """A place in `matrices` for each."""
        return [Place((rows, self.inputs), self._put(number)) for number, rows in enumerate(self.rows)]

    def __getitem__(self, rows: slice) -> Nf4:
        kept = _matrices(self.rows, rows)
        return Nf4(self.rows[kept], self.inputs, self.dtype, self.device, self.lock, self.matrices[kept])

    def _put(self, number: int) -> Callable[[Tensor], None]:
        def put(matrix: Tensor) -> None:
            # As one row: bitsandbytes 0.50 on a CPU finds the wrong scales where rows are no multiple of the blocks.
            on_device = matrix.to(self.device, self.dtype).reshape(1, -1)
            with self.lock:
                self.matrices[number] = bitsandbytes().quantize_4bit(
                    on_device, quant_type="nf4", blocksize=NF4_BLOCK, compress_statistics=True
                )

        return put


def allocator(quantization: str, dtype: torch.dtype, device: torch.device) -> Callable[[Sequence[int], int], Frozen]:
    """A function (rows of each stacked matrix, inputs) -> a weight of that size, to be filled through its `places`.

    The matrices of one allocator are quantised one at a time, whichever threads bring them: libraries that compile and
    cache on first use are not all made for several. Their reading and copying goes on in parallel.
    """
    lock = Lock()

    def allocate(rows: Sequence[int], inputs: int) -> Frozen:
        size, matrices = (sum(rows), inputs), tuple(rows)
        if quantization == "nf4":
            return Nf4(matrices, inputs, dtype, device, lock, [None] * len(matrices))
        if quantization == "fp8":
            scales = torch.empty((size[0], 1), dtype=torch.float32, device=device)
            return Fp8(torch.empty(size, dtype=FP8, device=device), scales, matrices, dtype, lock)
        return Dense(torch.empty(size, dtype=dtype, device=device), matrices)

    return allocate


def check(quantization: str, dtype: torch.dtype, device: torch.device) -> None:
    """ConfigError or ModelError when this machine cannot compute with weights quantised so, before anything is read."""
    if quantization == "nf4":
        bitsandbytes()
    if quantization != "fp8" or device.type != "cuda":
        return
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"model.quantization fp8 computes in bfloat16 on a GPU, model.dtype is {str(dtype).removeprefix('torch.')}: "
            "set it to auto or bfloat16"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or (major, minor) < (8, 9):
        raise ModelError(
            f"model.quantization fp8 needs an NVIDIA GPU of compute capability 8.9 or higher (Ada, Hopper or newer); "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}. Set model.quantization: nf4, or none"
        )


def check_generic(quantization: str, device: torch.device, reason: str) -> None:
    """ConfigError when only the decoder computes with weights quantised so; `reason`: why it does not take the model."""
    if quantization == "fp8":
        raise ConfigError(
            f"model.quantization fp8 needs the decoder: {reason}. Change that, or set model.quantization: none, or nf4 on a GPU"
        )
    if device.type != "cuda":
        # bitsandbytes 0.50 on CPUs with AVX512-BF16: once a layer was used for evaluation, no gradient goes through it.
        raise ConfigError(
            f"model.quantization nf4 on {device} needs the decoder: {reason}. Change that, or set model.quantization: none"
        )


def bitsandbytes() -> Any:
    """`bitsandbytes.functional`. ConfigError when it is not installed, or cannot be used on this machine."""
    quiet_bitsandbytes()
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(
            f"model.quantization nf4 needs bitsandbytes ({str(error).splitlines()[0]}): pip install 'lorikit[quant]'"
        ) from None
    return bitsandbytes.functional


def quiet_bitsandbytes() -> None:
    """Its import, which peft's brings along, warns on some CPUs that a product is slow which is never used there."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with weights of this type and place, and torch lets us ask for it."""
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(ops, "_linear_pointwise") or not hasattr(ops, "_reorder_linear_weight"):
        return False
    half = weight.dtype == torch.bfloat16 and hasattr(ops, "_is_mkldnn_bf16_supported")
    return weight.dtype == torch.float32 or (half and bool(ops._is_mkldnn_bf16_supported()))


def _matrices(rows: Sequence[int], wanted: slice) -> slice:
    """Rows of the stack, which must begin and end with a matrix -> the matrices that they are."""
    edges = list(accumulate(rows, initial=0))
    start, stop, _ = wanted.indices(edges[-1])
    assert start in edges and stop in edges, f"rows {start} to {stop} cut through matrices of {tuple(rows)} rows"
    return slice(edges.index(start), edges.index(stop))
