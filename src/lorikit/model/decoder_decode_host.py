"""decoder_decode.py for a CPU, where one row is limited by reading the weights and by the microseconds of each torch call.

The adapters of one product are two matrices: all A one under the other, and their B as blocks on a diagonal, times the scale,
so that q, k and v take two calls and not six. Rows with the same adapter stand together. Slots and positions are plain numbers.
A GPU without Triton takes this way too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from lorikit.model.decoder_adapter import Adapter, Lora
from lorikit.model.decoder_slots import Slots
from lorikit.model.frozen import Frozen
from lorikit.model.kernels.rmsnorm import rmsnorm

if TYPE_CHECKING:
    from lorikit.model.decoder import DecoderEngine

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """By layer and product (qkv, o, gate_up, down): A^T (I, M R) and the scaled blocks of B^T (M R, O)."""

    layers: tuple[dict[str, Pair], ...]


def host_adapter(adapter: Adapter) -> HostAdapter:
    """The adapter as it is now."""
    shape = adapter.shape
    widths = {
        "qkv": shape.q_width + 2 * shape.kv_width,
        "o": shape.hidden,
        "gate_up": 2 * shape.ffn,
        "down": shape.hidden,
    }
    layers = []
    for loras in adapter.loras:
        found = {"qkv": loras.qkv, "o": loras.o, "gate_up": loras.gate_up, "down": loras.down}
        layers.append({name: _pair(lora, widths[name]) for name, lora in found.items() if lora is not None})
    return HostAdapter(tuple(layers))


@dataclass(frozen=True, slots=True)
class HostRows:
    """The slots of B rows, where the token of each that is put through the model stands, and their adapters: (adapter, first
    row, row after the last)."""

    slots: Sequence[int]
    positions: Sequence[int]
    groups: Sequence[tuple[HostAdapter, int, int]]


def decode_on_host(engine: DecoderEngine, slots: Slots, rows: HostRows) -> Tensor:
    """Put the last token of each row's slot through the model -> logits (B, V) float32 after it."""
    shape, weights = engine.shape, engine.weights
    at = torch.tensor(rows.positions).to(engine.device)
    cos, sin = (table[at][:, None].to(weights.embed.dtype) for table in engine.rope_tables(slots.positions))
    turned = shape.heads + shape.kv_heads
    x = weights.embed[slots.last[list(rows.slots)]]
    for number, w in enumerate(weights.layers):
        h = _norm(x, w.norm, shape.eps)
        qkv = _product(h, w.qkv, w.qkv_bias, rows, number, "qkv").view(len(x), -1, shape.head_dim)
        if w.q_norm is not None and w.k_norm is not None:
            qkv[:, : shape.heads] = _norm(qkv[:, : shape.heads], w.q_norm, shape.eps)
            qkv[:, shape.heads : turned] = _norm(qkv[:, shape.heads : turned], w.k_norm, shape.eps)
        _turn(qkv[:, :turned], cos, sin)
        a = _attend(qkv, slots.cache[number], rows, shape.heads, shape.windows[number])
        x = x + _product(a, w.o, w.o_bias, rows, number, "o")
        h = _norm(x, w.mlp_norm, shape.eps)
        gate, up = _product(h, w.gate_up, w.gate_up_bias, rows, number, "gate_up").chunk(2, 1)
        x = x + _product(silu(gate).mul_(up), w.down, w.down_bias, rows, number, "down")
    return weights.output.forward(_norm(x, weights.norm, shape.eps)).float()


def _pair(lora: Lora, width: int) -> Pair:
    modules, rank, inputs = lora.a.shape
    b = lora.a.new_zeros(modules * rank, width)
    for m, (own, start) in enumerate(zip(lora.b, lora.starts, strict=True)):
        b[m * rank : (m + 1) * rank, start : start + len(own)] = own.t() * lora.scale
    return lora.a.reshape(modules * rank, inputs).t().clone(), b


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # torch's own would keep the weight's product in float32 for narrower types, which transformers does not.
    return rms_norm(x, weight.shape, weight, eps) if x.dtype == torch.float32 else rmsnorm(x, weight, eps)


def _product(x: Tensor, weight: Frozen, bias: Tensor | None, rows: HostRows, layer: int, name: str) -> Tensor:
    """x (B, I) -> x W^T + bias + the adapter of each row (B, O), the sum rounded once, as in peft."""
    y = weight.forward(x, bias)
    for adapter, first, end in rows.groups:
        pair = adapter.layers[layer].get(name)
        if pair is None:
            continue
        part, out = (x, y) if end - first == len(x) else (x[first:end], y[first:end])
        if part.dtype == pair[0].dtype:
            out.addmm_(part @ pair[0], pair[1])
        else:
            out.copy_(torch.addmm(out.to(pair[0].dtype), part.to(pair[0].dtype) @ pair[0], pair[1]))
    return y


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the heads of x (B, heads, E) in place; cos and sin (B, 1, E / 2)."""
    first, second = x.chunk(2, 2)
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    second.copy_(torch.addcmul(second * cos, first, sin))
    first.copy_(turned)


def _attend(qkv: Tensor, cache: Tensor, rows: HostRows, heads: int, window: int) -> Tensor:
    """Put the keys and values of qkv (B, H + 2K, E) into the cache (2, S, K, P, E) -> the attention of its queries (B, H E)."""
    kv_heads, width = cache.shape[2], qkv.shape[2]
    # The query heads of a group stand where a sequence's queries would: all of them see all keys.
    queries = qkv[:, :heads].view(len(qkv), kv_heads, heads // kv_heads, width)
    new = qkv[:, heads:].view(len(qkv), 2, kv_heads, width)
    out = []
    for row, (slot, newest) in enumerate(zip(rows.slots, rows.positions, strict=True)):
        cache[:, slot, :, newest] = new[row]
        first = max(0, newest + 1 - window) if window else 0
        k, v = cache[:, slot : slot + 1, :, first : newest + 1].unbind()
        out.append(scaled_dot_product_attention(queries[row : row + 1], k, v).view(1, -1))
    return out[0] if len(out) == 1 else torch.cat(out)
