"""Memory and time of the decoder's operations: as Triton kernels on a GPU, as their torch references on a CPU.

A kernel reads its inputs and writes its result. A reference makes tensors on its way, whose most bytes at a time, an
element of the result, are the constants below; they were counted on the references themselves (tests/test_plan.py holds
the sums to what torch allocates).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.model.decoder_config import DecoderShape
from lorikit.train.cost import Forward, Ledger, Stored, attended_pairs

# Bytes on the way in float32, and in a half type that is widened first.
_NORM, _NORM_BACKWARD = {4: 4, 2: 10}, {4: 16, 2: 20}
_SWIGLU, _SWIGLU_BACKWARD = {4: 4, 2: 8}, {4: 20, 2: 32}
_MASK = 10  # bytes an element of x while a dropout mask is made
_MASK_PASSES = 350  # time for each element of it, as bytes read and written
_PASSES = 3  # a reference reads and writes about so many times what a kernel does
_ADAPTER_SHARE = (
    0.5  # of the bandwidth, which the kernels with small matrices reach (benchmarks/results/kernels_h100.json)
)
_BLOCK = 128  # tokens in a tile of FlashAttention


class Ops:
    """The operations of one replay. `element` and `adapter_element` in bytes, `dropout` 0 outside training."""

    def __init__(self, ledger: Ledger, element: int, adapter_element: int, dropout: float, kernels: bool) -> None:
        self.ledger, self.e, self.c = ledger, element, adapter_element
        self.dropout, self.kernels = dropout, kernels

    def product(self, rows: int, inputs: int, outputs: int, stored: Stored) -> None:
        """With a frozen weight, which is copied first where its type cannot be multiplied."""
        if stored.copied:
            self.ledger.move(inputs * outputs * (stored.per_weight + stored.copied))
        self.ledger.product(rows, inputs, outputs, self.e, stored)

    def norm(self, rows: int, width: int, *, add: bool = False) -> None:
        """RMS norm, after a sum or not."""
        self._work(rows * width, (5 if add else 2) * self.e, _NORM[self.e])

    def norm_backward(self, rows: int, width: int) -> None:
        """And what is added to its result."""
        self._work(rows * width, 5 * self.e, _NORM_BACKWARD[self.e], operations=2)

    def swiglu(self, rows: int, ffn: int) -> None:
        """The gated activation."""
        self._work(rows * ffn, 3 * self.e, _SWIGLU[self.e])

    def swiglu_backward(self, rows: int, ffn: int) -> None:
        """Of gate and up together."""
        extra = _SWIGLU_BACKWARD[self.e] - 2 * self.e  # its result is the caller's to hold
        self._work(rows * ffn, 5 * self.e, extra)

    def rope(self, rows: int, width: int, head_dim: int) -> None:
        """In place; a reference looks its tables up and makes the halves anew."""
        self._work(rows * width, 2 * self.e, 8)
        if not self.kernels:
            self.ledger.spike("working", 4 * rows * head_dim)

    def lora(
        self, rows: int, inputs: int, outputs: int, adapted: Sequence[int], rank: int, *, gated: bool = False
    ) -> None:
        """A products with their masks, and B products added to y, or by the activation that reads it (`gated`)."""
        columns, size = len(adapted) * rank, rows * inputs
        self._masks(size, len(adapted))
        if self.kernels:
            self.ledger.spike("working", -(-inputs // 512) * rows * columns * 4)
        elif self.c != self.e:
            self.ledger.spike("working", (size + rows * outputs) * self.c)
        self.ledger.move(size * self.e / _ADAPTER_SHARE, 2)
        if not (gated and self.kernels and self.c == self.e):
            self.ledger.move(2 * rows * sum(adapted) * self.e / _ADAPTER_SHARE)

    def lora_backward(
        self, rows: int, inputs: int, outputs: int, adapted: Sequence[int], rank: int, *, needs_x: bool
    ) -> None:
        """Gradients of A and B in float32, and what goes on to x."""
        size = rows * inputs
        gradients = 4 * rank * sum(inputs + out for out in adapted)
        with self.ledger.local() as new:
            new(gradients, "gradient")
            if self.kernels:
                self.ledger.spike("working", _b_partial(rows, adapted, rank))
                new(-(-rows // 256) * len(adapted) * rank * inputs * 4)
            elif self.c != self.e:
                new((rows * outputs + size) * self.c)
            self._masks(size, len(adapted))
        self.ledger.move(rows * sum(adapted) * self.e / _ADAPTER_SHARE, 3)
        self.ledger.move(size * (3 if needs_x else 1) * self.e / _ADAPTER_SHARE, 2)

    def attention(self, forward: Forward, heads: int, head_dim: int, window: int, *, last: bool) -> None:
        """Queries with the keys before them, sequence by sequence."""
        pairs = attended_pairs(forward, window, last=last, tile=_BLOCK if self.kernels else 1)
        rows = forward.queries if last else forward.tokens
        rate = self.ledger.rates.attention_forward if self.ledger.rates else 0.0
        moved = 4 * rows * heads * head_dim * self.e
        self.ledger.compute(
            4.0 * pairs * heads * head_dim, moved, rate, 1 if self.kernels else 4 * len(forward.lengths)
        )

    def attention_backward(self, forward: Forward, shape: DecoderShape, layer: int, *, last: bool, qkv: int) -> None:
        """FlashAttention sums the gradient of q in float32 and makes one of k and v for each query head; on a CPU each
        sequence's gradients are put into ones of all tokens."""
        pairs = attended_pairs(forward, shape.windows[layer], last=last, tile=_BLOCK if self.kernels else 1)
        rows = forward.queries if last else forward.tokens
        rate = self.ledger.rates.attention_backward if self.ledger.rates else 0.0
        moved = 8 * rows * shape.q_width * self.e
        starts = 3 if self.kernels else 12 * len(forward.lengths)
        self.ledger.compute(10.0 * pairs * shape.q_width, moved, rate, starts)
        if self.kernels:
            padded = rows + _BLOCK * len(forward.lengths)
            heads = 2 * forward.tokens * shape.q_width * self.e if shape.heads != shape.kv_heads else 0
            self.ledger.spike("attention", qkv + 4 * padded * (shape.q_width + shape.heads) + heads)
        else:
            self.ledger.spike("attention", rows * shape.q_width * self.e + qkv + qkv // 5)

    def _masks(self, size: int, modules: int) -> None:
        if self.dropout and not self.kernels:
            self.ledger.spike("working", _MASK * size)
            self.ledger.move(modules * size * _MASK_PASSES, 20 * modules)

    def _work(self, elements: int, moved: int, extra: int, operations: int = 1) -> None:
        if self.kernels:
            self.ledger.move(elements * moved, operations)
        else:
            self.ledger.spike("working", elements * extra)
            self.ledger.move(elements * moved * _PASSES, 8 * operations)


def _b_partial(rows: int, adapted: Sequence[int], rank: int) -> int:
    """Bytes of the shares of a long sum in lora_b.py: for 128 columns of y each, and for 512 tokens each."""
    return 4 * rank * (sum(-(-out // 128) for out in adapted) * rows + -(-rows // 512) * sum(adapted))
