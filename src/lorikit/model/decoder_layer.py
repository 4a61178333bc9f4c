"""One decoder layer, forward and backward by hand, as one autograd function.

    h = norm(x)            q, k, v = h W_qkv^T + lora      (q, k normed per head in Qwen3, then turned by rope)
    a = attention          x2 = x + a W_o^T + lora         h2 = norm(x2)
    g, u = h2 W_gate_up^T + lora       y = x2 + (silu(g) u) W_down^T + lora

On a GPU the adapters of gate and up are added by the activation and its backward; what is kept of them is the bare product.
Kept for the backward is what the layer's level in decoder_memory.py says, and the adapters' inner products; the rest is
computed again. Frozen weights never get a gradient, and nothing is propagated below the first adapter. The last layer
computes query, attention, output and MLP only where a label needs them.

T tokens, S of them with a query, L of them with a label; D hidden, H heads, K kv heads, E head dim, F ffn, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorikit.model.decoder_adapter import NO_LORAS, LayerLoras, Lora
from lorikit.model.decoder_config import DecoderShape
from lorikit.model.decoder_memory import Keep
from lorikit.model.decoder_offload import HostCopies
from lorikit.model.decoder_weights import LayerWeights
from lorikit.model.frozen import Frozen
from lorikit.model.kernels.lora_a import lora_a, lora_a_backward
from lorikit.model.kernels.lora_b import add_lora_b, lora_b_backward
from lorikit.model.kernels.rmsnorm import add_rmsnorm, rmsnorm, rmsnorm_backward
from lorikit.model.kernels.rope import rope, rope_backward
from lorikit.model.kernels.swiglu import swiglu, swiglu_backward
from lorikit.model.kernels.swiglu_lora import runs_swiglu_lora, swiglu_lora, swiglu_lora_backward
from lorikit.model.packed_attention import side_by_side

Attend = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer computes with."""

    number: int
    shape: DecoderShape
    weights: LayerWeights
    loras: LayerLoras = NO_LORAS
    parameters: tuple[nn.Parameter, ...] = ()

    @property
    def window(self) -> int:
        """Its sliding window, 0 for none."""
        return self.shape.windows[self.number]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that the last layer needs: `queries` (S,) of its T (None: all), `labelled` (L,) of these S (None: all)."""

    queries: Tensor | None
    labelled: Tensor | None
    outputs: Tensor
    """(L,) of the T: queries[labelled]."""


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward share. `attend` is called as attend(layer, q, k, v); `last` is of the last layer; `keep`
    has a level for each layer, and `host` is where inputs go at the lowest."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor
    attend: Attend
    last: Rows | None = None
    p: float = 0.0
    seed: int | Tensor = 0
    keep: tuple[Keep, ...] = ()
    host: HostCopies | None = None

    def rows(self, layer: Layer) -> Rows | None:
        """The rows that this layer is cut to, None for all."""
        return self.last if layer.number == layer.shape.layers - 1 else None


def run_layer(x: Tensor, layer: Layer, step: Step) -> Tensor:
    """x (T, D) -> (T, D), or (L, D) from the last layer; with a graph to x and the adapter where either needs one."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters)):
        out: Tensor = _Layer.apply(x, layer, step, *layer.parameters)  # type: ignore[no-untyped-call]
        return out
    return _forward(x, layer, step, differentiable=False)[0]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, step: Step, *parameters: nn.Parameter) -> Tensor:
        keep = step.keep[layer.number] if step.keep else Keep.GATE_UP
        y, kept = _forward(x, layer, step, differentiable=keep >= Keep.PRODUCTS)
        ctx.layer, ctx.step, ctx.kept = layer, step, None if keep < Keep.PRODUCTS else kept.at(keep)
        ctx.on_host = None
        if keep == Keep.HOST and step.host is not None:
            ctx.on_host = step.host.put(x)
        else:
            ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0] if ctx.on_host is None else ctx.step.host.take(ctx.on_host)
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            _, kept = _forward(x, ctx.layer, ctx.step, differentiable=True)
        grad_x, grads = _backward(grad, x, kept, ctx.layer, ctx.step, needs_x=ctx.needs_input_grad[0])
        return grad_x, None, None, *grads


@dataclass(slots=True)
class _Kept:
    """What a forward leaves to its backward. `q`, `k`, `v` are leaves of the graph that ends in `attended`; what may be
    None is then computed again."""

    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    a: Tensor
    x2: Tensor
    z: dict[str, Tensor | None]
    raw_q: Tensor | None
    raw_k: Tensor | None
    gate_up: Tensor | None
    h: Tensor | None
    h2: Tensor | None
    m: Tensor | None

    def at(self, keep: Keep) -> _Kept:
        """Without what a level leaves out."""
        if keep < Keep.ALL:
            self.h = self.h2 = self.m = None
        if keep < Keep.GATE_UP:
            self.gate_up = None
        return self


def _forward(x: Tensor, layer: Layer, step: Step, *, differentiable: bool) -> tuple[Tensor, _Kept]:
    w, eps, rows = layer.weights, layer.shape.eps, step.rows(layer)
    z: dict[str, Tensor | None] = {}
    h = rmsnorm(x, w.norm, eps)
    q, k, v = _project(h, layer, step, z)
    raw_q = raw_k = None
    if w.q_norm is not None and w.k_norm is not None:
        raw_q, raw_k = q, k
        q, k = rmsnorm(q, w.q_norm, eps), rmsnorm(k, w.k_norm, eps)
    _turn(rope, q, k, step, rows)
    with torch.set_grad_enabled(differentiable):  # the graph of the attention alone; the rest is done by hand
        q, k, v = (t.detach().requires_grad_(differentiable) for t in (q, k, v))
        attended = step.attend(layer, q, k, v)
    a = attended.detach().flatten(1)  # (S, H E)
    if rows is not None:
        a = a if rows.labelled is None else a[rows.labelled]
        x = x[rows.outputs]
    o, z["o"] = _product(a, w.o, w.o_bias, layer.loras.o, step)
    x2, h2 = add_rmsnorm(x, o, w.mlp_norm, eps)
    gate_up, z["gate_up"] = _product(h2, w.gate_up, w.gate_up_bias, layer.loras.gate_up, step, gated=True)
    m = _swiglu(gate_up, z["gate_up"], layer.loras.gate_up)
    down, z["down"] = _product(m, w.down, w.down_bias, layer.loras.down, step)
    return down.add_(x2), _Kept(q, k, v, attended, a, x2, z, raw_q, raw_k, gate_up, h, h2, m)


def _project(h: Tensor, layer: Layer, step: Step, z: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """h (T, D) -> q (S, H, E), k and v (T, K, E), as views of one product where S is T."""
    w, loras, shape, rows = layer.weights, layer.loras, layer.shape, step.rows(layer)
    width = shape.q_width
    if rows is None or rows.queries is None:
        qkv, z["qkv"] = _product(h, w.qkv, w.qkv_bias, loras.qkv, step)
        q, kv = qkv[:, :width], qkv[:, width:]
    else:
        bias = w.qkv_bias
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        q, z["q"] = _product(h[rows.queries], w.qkv[:width], q_bias, loras.q, step)
        kv, z["kv"] = _product(h, w.qkv[width:], kv_bias, loras.kv, step)
    k, v = kv.view(-1, 2, shape.kv_heads, shape.head_dim).unbind(1)
    return q.view(-1, shape.heads, shape.head_dim), k, v


def _turn(how: Callable[..., None], q: Tensor, k: Tensor, step: Step, rows: Rows | None) -> None:
    """rope or its backward on q and k in place."""
    if rows is None or rows.queries is None:
        how(q, k, step.cos, step.sin, step.position_ids)
    else:
        how(q, q[:, :0], step.cos, step.sin, step.position_ids[rows.queries])
        how(k, k[:, :0], step.cos, step.sin, step.position_ids)


def _backward(
    grad: Tensor, x: Tensor, kept: _Kept, layer: Layer, step: Step, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """grad (T or L, D) of y -> the gradient of x, if needed, and those of the layer's parameters in their order."""
    w, loras, eps, rows = layer.weights, layer.loras, layer.shape.eps, step.rows(layer)
    needs_qkv = needs_x or loras.qkv is not None
    needs_x2 = needs_qkv or loras.o is not None
    needs_gate_up = needs_x2 or loras.gate_up is not None
    h2, gate_up, m = kept.h2, kept.gate_up, kept.m
    if h2 is None and (gate_up is None or loras.gate_up is not None):
        h2 = rmsnorm(kept.x2, w.mlp_norm, eps)
    if gate_up is None:
        assert h2 is not None
        gate_up, _ = _product(h2, w.gate_up, w.gate_up_bias, loras.gate_up, step, kept.z["gate_up"], gated=True)
    if m is None:
        m = _swiglu(gate_up, kept.z["gate_up"], loras.gate_up) if loras.down is not None else gate_up
    grad_m, grads = _product_backward(grad, m, kept.z["down"], w.down, loras.down, step, needs_x=needs_gate_up)
    if grad_m is None:
        return None, grads
    grad_gate_up = _swiglu_backward(grad_m, gate_up, kept.z["gate_up"], loras.gate_up)
    h2 = kept.x2 if h2 is None else h2
    grad_h2, more = _product_backward(
        grad_gate_up, h2, kept.z["gate_up"], w.gate_up, loras.gate_up, step, needs_x=needs_x2
    )
    grads = more + grads
    if grad_h2 is None:
        return None, grads
    grad_x2 = rmsnorm_backward(grad_h2, kept.x2, w.mlp_norm, eps, plus=grad)
    grad_a, more = _product_backward(grad_x2, kept.a, kept.z["o"], w.o, loras.o, step, needs_x=needs_qkv)
    grads = more + grads
    if grad_a is None:
        return None, grads
    grad_h, more = _attention_backward(grad_a, x, kept, layer, step, needs_h=needs_x)
    grads = more + grads
    if grad_h is None:
        return None, grads
    if rows is None:
        return rmsnorm_backward(grad_h, x, w.norm, eps, plus=grad_x2), grads
    return rmsnorm_backward(grad_h, x, w.norm, eps).index_add_(0, rows.outputs, grad_x2), grads


def _attention_backward(
    grad_a: Tensor, x: Tensor, kept: _Kept, layer: Layer, step: Step, *, needs_h: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """grad_a (L, H E) -> the gradient of h (T, D) and those of the adapters of q, k, v."""
    w, loras, eps, rows = layer.weights, layer.loras, layer.shape.eps, step.rows(layer)
    if rows is not None and rows.labelled is not None:
        # A bucket's spare rows name a label's own row again, with a gradient of zero: they are added, not copied.
        grad_a = grad_a.new_zeros(len(kept.q), grad_a.shape[1]).index_add_(0, rows.labelled, grad_a)
    found = torch.autograd.grad(kept.attended, (kept.q, kept.k, kept.v), grad_a.view_as(kept.attended))
    together = side_by_side(found)  # turned by rope in place, as its views
    grad_qkv = list(found) if together is not None else [found[0].contiguous(), found[1].contiguous(), found[2]]
    _turn(rope_backward, grad_qkv[0], grad_qkv[1], step, rows)
    if w.q_norm is not None and w.k_norm is not None and kept.raw_q is not None and kept.raw_k is not None:
        grad_qkv[0] = rmsnorm_backward(grad_qkv[0], kept.raw_q, w.q_norm, eps)
        grad_qkv[1] = rmsnorm_backward(grad_qkv[1], kept.raw_k, w.k_norm, eps)
        together = None
    flat = [t.flatten(1) for t in grad_qkv]
    h = kept.h if kept.h is not None else rmsnorm(x, w.norm, eps) if loras.qkv is not None else x
    if rows is None or rows.queries is None:
        every = torch.cat(flat, 1) if together is None else together
        return _product_backward(every, h, kept.z["qkv"], w.qkv, loras.qkv, step, needs_x=needs_h)
    width = layer.shape.q_width
    grad_h, more = _product_backward(
        torch.cat(flat[1:], 1), h, kept.z["kv"], w.qkv[width:], loras.kv, step, needs_x=needs_h
    )
    at = rows.queries
    grad_some, grads = _product_backward(flat[0], h[at], kept.z["q"], w.qkv[:width], loras.q, step, needs_x=needs_h)
    if grad_h is not None and grad_some is not None:
        grad_h.index_add_(0, at, grad_some)
    return grad_h, grads + more


def _product(
    x: Tensor,
    weight: Frozen,
    bias: Tensor | None,
    lora: Lora | None,
    step: Step,
    z: Tensor | None = None,
    *,
    gated: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """x W^T + bias + the adapters -> y, and the adapters' inner products z (rows, M R) before their scale, if they are
    not known yet. `gated`: y goes to `_swiglu`, which adds the adapters where it can."""
    y = weight.forward(x, bias)
    if lora is None:
        return y, None
    if z is None:
        z = lora_a(x.to(lora.a.dtype), lora.a, step.p, step.seed, lora.streams)
    if gated and _adds(y, z, lora):
        return y, z
    wide = y.to(z.dtype)  # in another type than the base's the sum is rounded once, as in peft
    add_lora_b(wide, z, lora.b, lora.starts, lora.scale)
    return wide.to(y.dtype), z


def _swiglu(gate_up: Tensor, z: Tensor | None, lora: Lora | None) -> Tensor:
    """The activation of what `_product` gave."""
    if lora is not None and z is not None and _adds(gate_up, z, lora):
        return swiglu_lora(gate_up, z, lora.b, lora.starts, lora.scale)
    return swiglu(gate_up)


def _swiglu_backward(grad: Tensor, gate_up: Tensor, z: Tensor | None, lora: Lora | None) -> Tensor:
    if lora is not None and z is not None and _adds(gate_up, z, lora):
        return swiglu_lora_backward(grad, gate_up, z, lora.b, lora.starts, lora.scale)
    return swiglu_backward(grad, gate_up)


def _adds(gate_up: Tensor, z: Tensor, lora: Lora) -> bool:
    """Whether the activation adds the adapters; the same whenever it is asked for one product."""
    return z.dtype == gate_up.dtype and runs_swiglu_lora(gate_up, z, lora.b)


def _product_backward(
    grad: Tensor, x: Tensor, z: Tensor | None, weight: Frozen, lora: Lora | None, step: Step, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """grad of y -> the gradient of x, if needed, and float32 gradients of A and B, module by module."""
    grad_x = weight.input_gradient(grad) if needs_x else None
    if lora is None or z is None:
        return grad_x, []
    grad_z, grad_b = lora_b_backward(grad.to(z.dtype), z, lora.b, lora.starts, lora.scale)
    in_place = grad_x if grad_x is not None and grad_x.dtype == z.dtype else None
    through, grad_a = lora_a_backward(
        grad_z, x.to(z.dtype), lora.a, step.p, step.seed, lora.streams, in_place, needs_x=needs_x
    )
    if grad_x is not None and through is not None:
        grad_x = through if in_place is not None else (grad_x + through).to(grad_x.dtype)
    return grad_x, [t for pair in zip(grad_a.unbind(), grad_b, strict=True) for t in pair]
