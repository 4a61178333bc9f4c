"""Memory and time of the decoder's forward and backward, replayed from its shape: decoder_layer.py with sizes for tensors.

What a layer keeps is what its level in decoder_memory.py says, and R numbers a module and the log-sum-exp, H float32. Its
backward holds, besides, in elements of the base's type a token (D hidden, F ffn, H E queries, K E keys):

    F + F + 2 F    m, its gradient, that of gate and up      3 D + H E    gradients of h2, x2, a; h2 itself
    2 (H E + 2 K E)    gradients of q, k, v, and side by side      3 D    h, its gradient, that of x

less of these what was kept. What a CPU allocates more, in the torch references of the kernels, is in cost_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorikit.model.decoder_config import LINEAR, DecoderShape
from lorikit.model.decoder_memory import Keep
from lorikit.train.cost import Forward, Ledger, Stored
from lorikit.train.cost_ops import Ops

_GROUPS = {
    "qkv": LINEAR[:3],
    "q": LINEAR[:1],
    "kv": LINEAR[1:3],
    "o": LINEAR[3:4],
    "gate_up": LINEAR[4:6],
    "down": LINEAR[6:],
}
_CHUNK_CPU, _CHUNK = 1 << 22, 1 << 27  # as decoder_loss.py cuts its logits

New = Callable[..., None]


@dataclass(frozen=True, slots=True)
class DecoderCost:
    """What the replay needs to know. `modules` are the adapted linear layers' names by layer; `keep` one level a layer;
    `element` and `adapter_element` bytes of an element of the base and of the adapter's products; `kernels` whether the
    Triton kernels run; `steps_graph` whether the gradients of a step exist beside `.grad` until its end, as in a graph.
    """

    shape: DecoderShape
    modules: tuple[frozenset[str], ...]
    rank: int
    dropout: float
    keep: tuple[Keep, ...]
    element: int
    adapter_element: int
    kernels: bool
    linear: Stored

    @property
    def first(self) -> int:
        """The lowest layer with an adapter: below it nothing is kept or propagated."""
        return next(n for n, names in enumerate(self.modules) if names)

    def sizes(self, layer: int, group: str) -> list[tuple[int, int]]:
        """(outputs, inputs) of the adapted modules of a product."""
        return [self.shape.linear(name) for name in _GROUPS[group] if name in self.modules[layer]]

    def parameters(self, layers: Sequence[int] | None = None) -> int:
        """Numbers in the adapter, or in that of some layers."""
        chosen = range(self.shape.layers) if layers is None else layers
        return sum(self.rank * sum(self.shape.linear(name)) for n in chosen for name in self.modules[n])


def base_parameters(shape: DecoderShape) -> tuple[int, int]:
    """Numbers in the linear layers, and in embedding, head, norms and biases."""
    rows = {name: shape.linear(name)[0] for name in LINEAR}
    biases = sum(rows[name] for name in LINEAR[:3] if shape.qkv_bias) + rows["o_proj"] * shape.o_bias
    biases += (2 * shape.ffn + shape.hidden) * shape.mlp_bias
    norms = 2 * shape.hidden + 2 * shape.head_dim * shape.qk_norm
    embed = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.linear_weights(), shape.layers * (norms + biases) + shape.hidden + embed


def static_bytes(cost: DecoderCost) -> dict[str, int]:
    """Bytes of weights and adapter, which stay for the whole run."""
    shape = cost.shape
    linear = shape.layers * sum(cost.linear.size(*shape.linear(name)) for name in LINEAR)
    linear += round(shape.linear_weights() * cost.linear.kept)
    copied = max(shape.ffn * 2, shape.q_width + 2 * shape.kv_width) * shape.hidden * cost.linear.copied
    copy = 0 if cost.adapter_element == 4 else cost.adapter_element
    return {
        "weights": linear + base_parameters(shape)[1] * cost.element + round(copied),
        "adapter": cost.parameters() * (4 + copy + 4 + 8),  # float32, its copy, gradient, two moments
    }


def training(cost: DecoderCost, forward: Forward, ledger: Ledger) -> list[int]:
    """One forward, its loss and its backward, written to the ledger, which is left as it was. Returns the bytes that each
    layer keeps, its input among them."""
    replay = _Replay(cost, forward, ledger, training=True)
    with ledger.local() as new:
        replay.inputs(new)
        return replay.run()


def evaluation(cost: DecoderCost, forward: Forward, ledger: Ledger) -> None:
    """The losses of one forward, without a gradient."""
    replay = _Replay(cost, forward, ledger, training=False)
    with ledger.local() as new:
        replay.inputs(new)
        for layer in range(cost.shape.layers):
            with ledger.local() as local:
                local(replay.width(layer))
                replay.forward(layer, local, local, Keep.INPUT)
        new(2 * replay.width(cost.shape.layers))
        replay.ops.norm(forward.labels, cost.shape.hidden)
        replay.logits(with_gradient=False)


class _Replay:
    """One forward in progress: how much each layer keeps until its backward."""

    def __init__(self, cost: DecoderCost, forward: Forward, ledger: Ledger, *, training: bool) -> None:
        self.cost, self.sizes, self.ledger, self.shape = cost, forward, ledger, cost.shape
        self.ops = Ops(ledger, cost.element, cost.adapter_element, cost.dropout if training else 0.0, cost.kernels)
        self.training = training

    def inputs(self, new: New) -> None:
        """Ids, positions and rope's tables."""
        sizes, shape = self.sizes, self.shape
        positions = 1 << (max(sizes.lengths) - 1).bit_length()
        new(4 * positions * shape.head_dim + 8 * (2 * sizes.tokens + sizes.queries + 3 * sizes.labels))

    def width(self, layer: int) -> int:
        """Bytes of the input of a layer, or of the last one's output."""
        rows = self.sizes.labels if layer == self.shape.layers else self.sizes.tokens
        return rows * self.shape.hidden * self.cost.element

    def run(self) -> list[int]:
        """Up through the layers, the loss, and down again; the bytes that each layer kept."""
        ledger, cost, layers = self.ledger, self.cost, self.shape.layers
        kept: list[list[int]] = [[] for _ in range(layers)]

        def keeper(layer: int) -> New:
            def keep(size: int, part: str = "activations") -> None:
                ledger.take("activations", size)
                kept[layer].append(size)

            return keep

        ledger.take("working", self.width(0))
        for layer in range(layers):
            level = cost.keep[layer] if layer >= cost.first else None
            part = "activations" if level and level > Keep.HOST else "working"
            ledger.free("working", self.width(layer))
            ledger.take(part, self.width(layer))
            with ledger.local() as local:
                keep = keeper(layer) if level and level >= Keep.PRODUCTS else local
                self.forward(layer, local, keep, level or Keep.INPUT)
                ledger.take("working", self.width(layer + 1))
            if part == "working":
                ledger.free("working", self.width(layer))
                ledger.move(self.width(layer), 1)
        by_layer = [
            sum(sizes) + self.width(n) * (n >= cost.first and cost.keep[n] > Keep.HOST) for n, sizes in enumerate(kept)
        ]
        self._loss()
        gradients = 0
        for layer in reversed(range(cost.first, layers)):
            on_host = cost.keep[layer] == Keep.HOST
            with ledger.local() as local:
                if on_host:  # it comes back, and the one below on its heels
                    local(2 * self.width(layer))
                self.backward(layer, local, kept[layer])
                ledger.take("working", self.width(layer))
            if not on_host:
                ledger.free("activations", self.width(layer))
            ledger.free("working", self.width(layer + 1))
            size = cost.parameters([layer]) * 4
            ledger.take("gradient", size)
            gradients += size
            if not self.sizes.bucket:  # added to the buffer at once
                ledger.move(3 * size, 2 * len(cost.modules[layer]))
                ledger.free("gradient", size)
        if self.sizes.bucket:
            ledger.move(3 * gradients, 4)
            ledger.free("gradient", gradients)
        ledger.free("working", self.width(cost.first))
        return by_layer

    def forward(self, layer: int, local: New, keep: New, level: Keep) -> None:
        """`_forward`: `local` holds what its variables do, `keep` what it leaves to the backward at this level."""
        ops, shape, e = self.ops, self.shape, self.cost.element
        last = layer == shape.layers - 1
        rows = self.sizes.labels if last else self.sizes.tokens
        hidden, ffn, q_width = shape.hidden, shape.ffn, shape.q_width
        most = keep if level >= Keep.ALL else local
        ops.norm(self.sizes.tokens, hidden)
        most(self.sizes.tokens * hidden * e)
        self._project(layer, keep)
        self._attend(layer, keep, last=last)
        if last:
            local(rows * (q_width + hidden) * e)
            self.ledger.move(2 * rows * (q_width + hidden) * e, 2)
        self.product(rows, q_width, hidden, layer, "o", local, keep)
        keep(rows * hidden * e)
        ops.norm(rows, hidden, add=True)
        most(rows * hidden * e)
        self.product(rows, hidden, 2 * ffn, layer, "gate_up", keep if level >= Keep.GATE_UP else local, keep)
        ops.swiglu(rows, ffn)
        most(rows * ffn * e)
        with self.ledger.local() as new:
            self.product(rows, ffn, hidden, layer, "down", new, keep)
        self.ledger.move(3 * rows * hidden * e)

    def product(self, rows: int, inputs: int, outputs: int, layer: int, group: str, new: New, keep: New) -> None:
        """`_product`: y goes to `new`, the adapters' inner products to `keep`."""
        new(rows * outputs * self.cost.element)
        self.ops.product(rows, inputs, outputs, self.cost.linear)
        adapted = self.cost.sizes(layer, group)
        if adapted:
            keep(rows * len(adapted) * self.cost.rank * self.cost.adapter_element)
            sizes = [size for size, _ in adapted]
            self.ops.lora(rows, inputs, outputs, sizes, self.cost.rank, gated=group == "gate_up")

    def _project(self, layer: int, keep: New) -> None:
        shape, e, tokens, queries = self.shape, self.cost.element, self.sizes.tokens, self.sizes.queries
        hidden, q_width, kv_width = shape.hidden, shape.q_width, 2 * shape.kv_width
        if layer < shape.layers - 1 or self.sizes.bucket:  # a bucket's every token asks a query
            queries = tokens
            self.product(tokens, hidden, q_width + kv_width, layer, "qkv", keep, keep)
        else:
            self.ledger.spike("working", queries * (hidden + q_width) * e)
            self.product(queries, hidden, q_width, layer, "q", keep, keep)
            self.product(tokens, hidden, kv_width, layer, "kv", keep, keep)
        if shape.qk_norm:
            self.ops.norm(queries * shape.heads, shape.head_dim)
            self.ops.norm(tokens * shape.kv_heads, shape.head_dim)
            keep((queries * q_width + tokens * kv_width // 2) * e)
        self.ops.rope(queries, q_width, shape.head_dim)
        self.ops.rope(tokens, kv_width // 2, shape.head_dim)

    def _attend(self, layer: int, keep: New, *, last: bool) -> None:
        shape, e = self.shape, self.cost.element
        queries = self.sizes.queries if last else self.sizes.tokens
        keep(queries * shape.q_width * e)
        keep(queries * shape.heads * 4)
        if not self.cost.kernels:  # a tensor a sequence, and their concatenation
            keep(queries * shape.q_width * e)
        self.ops.attention(self.sizes, shape.heads, shape.head_dim, shape.windows[layer], last=last)

    def _loss(self) -> None:
        """decoder_loss.loss_sum and its backward, which multiplies the gradient that the forward left."""
        width, labels = self.width(self.shape.layers), self.sizes.labels
        with self.ledger.local() as new:
            self.ops.norm(labels, self.shape.hidden)
            new(width, "logits")
            self.logits(with_gradient=True)
            new(2 * width, "logits")
            self.ops.norm_backward(labels, self.shape.hidden)
            self.ledger.spike("logits", width)
        self.ledger.spike("logits", width)

    def logits(self, *, with_gradient: bool) -> None:
        """One chunk after the other."""
        labels, shape, e = self.sizes.labels, self.shape, self.cost.element
        if not labels:
            return
        count = -(-labels * shape.vocabulary // (_CHUNK if self.cost.kernels else _CHUNK_CPU))
        rows = -(-labels // count)
        chunk = rows * shape.vocabulary
        wide = 0 if self.cost.kernels or e == 4 else 4 * chunk  # the reference's copy in float32
        grads = labels * shape.hidden * e if count > 1 and with_gradient else 0
        self.ledger.spike("logits", grads + chunk * e + wide)
        self.ledger.product(labels, shape.hidden, shape.vocabulary, e)
        if self.cost.kernels:
            self.ledger.move(labels * shape.vocabulary * e * (3 if with_gradient else 1), 5 * count)
        else:
            self.ledger.move(labels * shape.vocabulary * (2 * e + 4 * (9 if with_gradient else 3)), 10 * count)
        if with_gradient:
            self.ledger.product(labels, shape.hidden, shape.vocabulary, e)

    def backward(self, layer: int, new: New, kept: list[int]) -> None:
        """`_backward` with what was kept, or computed again before it; frees `kept` when it is done."""
        cost, shape, ops, e = self.cost, self.shape, self.ops, self.cost.element
        last, level = layer == shape.layers - 1, cost.keep[layer]
        rows = self.sizes.labels if last else self.sizes.tokens
        hidden, ffn = shape.hidden, shape.ffn
        needs_x = layer > cost.first
        needs_qkv = needs_x or bool(cost.sizes(layer, "qkv"))
        needs_x2 = needs_qkv or bool(cost.sizes(layer, "o"))
        needs_gate_up = needs_x2 or bool(cost.sizes(layer, "gate_up"))
        if level < Keep.PRODUCTS:  # all is there again, as if it had been kept
            self.forward(layer, new, new, Keep.ALL)
            new(rows * hidden * e)
            level = Keep.ALL
        has_h2 = level >= Keep.ALL
        if not has_h2 and (level < Keep.GATE_UP or cost.sizes(layer, "gate_up")):
            ops.norm(rows, hidden)
            new(rows * hidden * e)
        if level < Keep.GATE_UP:
            self.product(rows, hidden, 2 * ffn, layer, "gate_up", new, lambda size: None)
        if level < Keep.ALL and cost.sizes(layer, "down"):
            ops.swiglu(rows, ffn)
            new(rows * ffn * e)
        self.product_backward(rows, ffn, hidden, layer, "down", new, needs_x=needs_gate_up)
        if needs_gate_up:
            ops.swiglu_backward(rows, ffn)
            new(2 * rows * ffn * e)
            self.product_backward(rows, hidden, 2 * ffn, layer, "gate_up", new, needs_x=needs_x2)
        if needs_x2:
            ops.norm_backward(rows, hidden)
            new(rows * hidden * e)
            self.product_backward(rows, shape.q_width, hidden, layer, "o", new, needs_x=needs_qkv)
        if needs_qkv:
            self._attention_backward(layer, last=last, needs_x=needs_x, has_h=level >= Keep.ALL)
        if needs_x:
            ops.norm_backward(self.sizes.tokens, hidden)
        for size in kept:
            self.ledger.free("activations", size)
        kept.clear()

    def product_backward(
        self, rows: int, inputs: int, outputs: int, layer: int, group: str, new: New, *, needs_x: bool
    ) -> None:
        """`_product_backward`: the gradient of x goes to `new`."""
        if needs_x:
            new(rows * inputs * self.cost.element)
            self.ops.product(rows, outputs, inputs, self.cost.linear)
        adapted = [size for size, _ in self.cost.sizes(layer, group)]
        if adapted:
            self.ops.lora_backward(rows, inputs, outputs, adapted, self.cost.rank, needs_x=needs_x)

    def _attention_backward(self, layer: int, *, last: bool, needs_x: bool, has_h: bool) -> None:
        shape, e, ledger, ops = self.shape, self.cost.element, self.ledger, self.ops
        tokens = self.sizes.tokens
        queries = self.sizes.queries if last else tokens
        hidden, q_width, kv_width = shape.hidden, shape.q_width, 2 * shape.kv_width
        with ledger.local() as new:
            if last:
                new(queries * q_width * e)
            qkv = (queries * q_width + tokens * kv_width) * e
            ops.attention_backward(self.sizes, shape, layer, last=last, qkv=qkv)
            new(qkv)
            if not self.cost.kernels:
                new(qkv)  # made contiguous
            ops.rope(queries, q_width, shape.head_dim)
            ops.rope(tokens, kv_width // 2, shape.head_dim)
            if shape.qk_norm:
                ops.norm_backward(queries * shape.heads, shape.head_dim)
                ops.norm_backward(tokens * shape.kv_heads, shape.head_dim)
                new(qkv - tokens * kv_width // 2 * e)
            if not has_h and self.cost.sizes(layer, "qkv"):
                ops.norm(tokens, hidden)
                new(tokens * hidden * e)
            ledger.move(2 * qkv)
            if not last or self.sizes.bucket:
                with ledger.local() as inner:
                    inner(qkv)
                    self.product_backward(tokens, hidden, q_width + kv_width, layer, "qkv", new, needs_x=needs_x)
                return
            with ledger.local() as inner:
                inner(tokens * kv_width * e)
                self.product_backward(tokens, hidden, kv_width, layer, "kv", new, needs_x=needs_x)
            with ledger.local() as inner:
                inner(queries * hidden * e)
                self.product_backward(queries, hidden, q_width, layer, "q", new, needs_x=needs_x)
