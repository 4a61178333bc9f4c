"""One more token of each of B sequences: the layers of decoder_layer.py without anything that a gradient would need.

h = norm(x)   q, k, v = h W_qkv^T + lora   k, v into the cache   a = attention over the cache   x = x + a W_o^T + lora
h = norm(x)   x = x + (silu(g) u) W_down^T + lora,   g, u = h W_gate_up^T + lora
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lorikit.model.decoder_slots import Slots
from lorikit.model.frozen import Frozen
from lorikit.model.kernels.decode_attention import decode_attention, store_turned
from lorikit.model.kernels.rmsnorm import add_rmsnorm, rmsnorm
from lorikit.model.kernels.swiglu import swiglu

if TYPE_CHECKING:
    from lorikit.model.decoder import DecoderEngine


class Products(Protocol):
    """The linear layers with the adapters of the rows that are computed."""

    def product(self, x: Tensor, weight: Frozen, bias: Tensor | None, layer: int, name: str) -> Tensor:
        """x (B, I) -> x W^T + bias + the adapter of each row (B, O); `name` is qkv, o, gate_up or down."""
        ...


def decode_logits(engine: DecoderEngine, slots: Slots, rows: Tensor, products: Products) -> Tensor:
    """Put the last token of each slot in `rows` (B,) through the model -> logits (B, V) float32 after it."""
    shape, weights = engine.shape, engine.weights
    positions = slots.length[rows].clamp_(max=slots.positions - 1)  # of rows that belong to nobody
    cos, sin = engine.rope_tables(slots.positions)
    scale = shape.head_dim**-0.5
    x = weights.embed[slots.last[rows]]
    down: Tensor | None = None
    for number, w in enumerate(weights.layers):
        if down is None:
            h = rmsnorm(x, w.norm, shape.eps)
        else:
            x, h = add_rmsnorm(x, down, w.norm, shape.eps)
        qkv = products.product(h, w.qkv, w.qkv_bias, number, "qkv").view(len(rows), -1, shape.head_dim)
        q, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], 1)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = rmsnorm(q, w.q_norm, shape.eps), rmsnorm(k, w.k_norm, shape.eps)
        keys, values = slots.layer(number)
        store_turned(q, k, v, cos, sin, positions, rows, keys, values)
        a = decode_attention(q, keys, values, rows, positions, scale, shape.windows[number])
        o = products.product(a.flatten(1), w.o, w.o_bias, number, "o")
        x, h = add_rmsnorm(x, o, w.mlp_norm, shape.eps)
        gate_up = products.product(h, w.gate_up, w.gate_up_bias, number, "gate_up")
        down = products.product(swiglu(gate_up), w.down, w.down_bias, number, "down")
    assert down is not None
    _, h = add_rmsnorm(x, down, weights.norm, shape.eps)
    return products.product(h, weights.output, None, 0, "head").float()
