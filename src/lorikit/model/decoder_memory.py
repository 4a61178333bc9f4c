"""How much a decoder layer keeps for its backward, chosen for each layer by the memory there is.

    level      kept for each token                                      computed again in the backward
    ALL        x, q, k, v, attention, x2, gate_up, h, h2, m             nothing
    GATE_UP    x, q, k, v, attention, x2, gate_up                       norms and silu(g) u
    PRODUCTS   x, q, k, v, attention, x2                                and the product with gate and up
    INPUT      x                                                        the whole layer
    HOST       nothing (x goes to pinned host memory)                   the whole layer

Names as in decoder_layer.py. From one level to the next the bytes that are saved cost more time. Lower layers take the
lower level: they are the last ones whose backward comes.
"""

from __future__ import annotations

from enum import IntEnum

from lorikit.model.decoder_config import DecoderShape

_CHUNK = 1 << 27  # logits of one chunk, as decoder_loss.py cuts them; their gradient takes their place
_SLACK = 512 << 20  # what the allocator loses between its blocks, and libraries take


def keeps_turned(shape: DecoderShape, free: int) -> bool:
    """Whether linear weights in fp8 are kept transposed too, for their backward, where `free` bytes are left beside them and
    the adapter: the copies take a byte a weight, and at most a quarter of what is free."""
    return shape.linear_weights() <= free // 4


class Keep(IntEnum):
    """Levels, each with all that the lower ones keep."""

    HOST = 0
    INPUT = 1
    PRODUCTS = 2
    GATE_UP = 3
    ALL = 4


def kept_bytes(shape: DecoderShape, keep: Keep, element: int) -> int:
    """Bytes that one token of one layer leaves to the backward; `element` bytes a number."""
    hidden, ffn, qkv = shape.hidden, shape.ffn, shape.q_width + 2 * shape.kv_width
    numbers = 0
    if keep >= Keep.INPUT:
        numbers += hidden
    if keep >= Keep.PRODUCTS:
        numbers += hidden + qkv + shape.q_width
        numbers += shape.q_width + shape.kv_width if shape.qk_norm else 0
    if keep >= Keep.GATE_UP:
        numbers += 2 * ffn
    if keep >= Keep.ALL:
        numbers += 2 * hidden + ffn
    return numbers * element + (4 * shape.heads if keep >= Keep.PRODUCTS else 0)


def passing_bytes(shape: DecoderShape, tokens: int, element: int) -> int:
    """Bytes beside what is kept, at their peak: one layer's forward and backward, or a chunk of logits."""
    layer = kept_bytes(shape, Keep.ALL, element) + (3 * shape.ffn + 4 * shape.hidden) * element
    layer += (
        4 + 2 * element
    ) * shape.q_width  # attention's gradient of q in float32, and of k and v for each query head
    return max(tokens * layer, _CHUNK * element + 4 * tokens * shape.hidden * element) + _SLACK


def choose(shape: DecoderShape, tokens: int, free: int, element: int, highest: Keep = Keep.ALL) -> tuple[Keep, ...]:
    """The level of each layer for a forward of so many tokens within `free` bytes: as high as they allow."""
    room = free - passing_bytes(shape, tokens, element)
    for high in range(highest, Keep.HOST, -1):
        low = Keep(high - 1)
        least = shape.layers * tokens * kept_bytes(shape, low, element)
        if least <= room:
            more = tokens * (kept_bytes(shape, Keep(high), element) - kept_bytes(shape, low, element))
            count = min(shape.layers, (room - least) // max(more, 1))
            return (low,) * (shape.layers - count) + (Keep(high),) * count
    return (Keep.HOST,) * shape.layers
