"""Several adapters at once, unmerged: all loaded ones stacked, so that each row of a batch multiplies with its own.

Adapters keep their own ranks and modules: what they lack is zero in the stack (kernels/row_lora.py). A copy of 2 bytes a
parameter, made when requests begin to be answered and again when an adapter is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorikit.model.decoder_adapter import GROUPS, Adapter
from lorikit.model.decoder_config import DecoderShape
from lorikit.model.frozen import Dense, Frozen
from lorikit.model.kernels.row_lora import Stack, add_row_lora, one_row

_NAMES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Stacks:
    """The stacks of all layers by product, and the number of each adapter in them; 0 is the base."""

    layers: tuple[dict[str, Stack], ...]
    numbers: Mapping[str | None, int]


def stack_adapters(shape: DecoderShape, adapters: Mapping[str, Adapter]) -> Stacks:
    """The adapters as they are now."""
    for adapter in adapters.values():
        adapter.refresh()  # what is copied is in the compute type
    numbers: dict[str | None, int] = {None: 0} | {name: n for n, name in enumerate(adapters, start=1)}
    layers = tuple(_stack_layer(shape, number, list(adapters.values())) for number in range(shape.layers))
    return Stacks(layers, numbers)


@dataclass(frozen=True, slots=True)
class Stacked:
    """The linear layers for rows with these adapters (B,) int64, by their number in the stacks."""

    stacks: Stacks | None
    adapters: Tensor

    def product(self, x: Tensor, weight: Frozen, bias: Tensor | None, layer: int, name: str) -> Tensor:
        """x (B, I) -> x W^T + bias + the adapter of each row (B, O)."""
        stack = None if self.stacks is None else self.stacks.layers[layer].get(name)
        if len(x) == 1 and isinstance(weight, Dense):
            return one_row(x, weight.weight, bias, stack, self.adapters)
        y = weight.forward(x, bias)
        return y if stack is None else add_row_lora(y, x, stack, self.adapters)


def _stack_layer(shape: DecoderShape, layer: int, adapters: Sequence[Adapter]) -> dict[str, Stack]:
    found = {}
    for name, group in zip(_NAMES, GROUPS, strict=True):
        loras = [getattr(adapter.loras[layer], name) for adapter in adapters]
        if all(lora is None for lora in loras):
            continue
        sizes = [shape.linear(module) for module in group]
        starts = tuple(sum(outputs for outputs, _ in sizes[:m]) for m in range(len(sizes)))
        rank, compute = max(adapter.rank for adapter in adapters), adapters[0].compute
        a = compute.new_zeros(len(adapters) + 1, len(group), rank, sizes[0][1])
        b = compute.new_zeros(len(adapters) + 1, sum(outputs for outputs, _ in sizes), rank)
        for n, lora in enumerate(loras, start=1):
            if lora is None:
                continue
            own = lora.a.shape[1]
            for one_a, one_b, start in zip(lora.a, lora.b, lora.starts, strict=True):
                a[n, starts.index(start), :own] = one_a
                b[n, start : start + len(one_b), :own] = one_b
        scales = torch.tensor([0.0, *(adapter.scale for adapter in adapters)]).to(compute.device)
        found[name] = Stack(a.flatten(1, 2), b, scales, starts)
    return found
