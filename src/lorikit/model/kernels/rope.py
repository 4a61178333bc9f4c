"""Rotary position embedding of queries and keys, in place, in transformers' rotate-half layout.

    (x1, x2) = halves of a head's E elements;  x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin

cos, sin (P, E / 2) hold one row for each position; computed in float32 and rounded once. The backward is the inverse
rotation: the same with -sin.
"""

from __future__ import annotations

from torch import Tensor

from lorikit.model.kernels.launch import Pointer, Value, block, constexpr, kernel, launch, runs_kernel, tl


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    """Rotate q (T, H, E) and k (T, K, E) in place; both may be views of one (T, (H + 2K) E) buffer, k may have no heads.

    cos and sin (P, E / 2) float32, contiguous: cos(position * inverse frequency), with any scaling in them already.
    position_ids (T,) integers below P. Raises ValueError when shapes do not fit.
    """
    _check(q, k, cos, sin, position_ids)
    _rotate(q, k, cos, sin, position_ids, back=False)


def rope_backward(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    """Turn the gradients of the rotated q and k, in place, into those of the unrotated; arguments as for `rope`."""
    _check(grad_q, grad_k, cos, sin, position_ids)
    _rotate(grad_q, grad_k, cos, sin, position_ids, back=True)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *, back: bool = False) -> None:
    """What the kernel computes, in torch: x (T, heads, E) is rotated in place."""
    c, s = cos[position_ids][:, None, :], sin[position_ids][:, None, :]
    s = -s if back else s
    first, second = x.chunk(2, dim=-1)
    rotated = first * c - second * s
    second.copy_(second * c + first * s)
    first.copy_(rotated)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> None:
    tokens, _, width = q.shape
    if k.shape[0] != tokens or k.shape[2] != width or position_ids.shape != (tokens,) or q.dtype != k.dtype:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and position_ids {tuple(position_ids.shape)} do not fit"
        )
    if width % 2 or cos.shape != sin.shape or cos.shape[1:] != (width // 2,):
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (P, E / 2) of an even E {width}")


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, *, back: bool) -> None:
    tables = cos.is_contiguous() and sin.is_contiguous() and position_ids.is_contiguous()
    taken = (
        runs_kernel(q, cos, sin) and k.device == q.device and q.stride(2) == 1 and (k.stride(2) == 1 or not k.numel())
    )
    if not (tables and taken):
        rope_reference(q, cos, sin, position_ids, back=back)
        rope_reference(k, cos, sin, position_ids, back=back)
        return
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    launch(
        _rope_kernel,
        (tokens,),
        q,
        k,
        cos,
        sin,
        position_ids,
        *q.stride()[:2],
        *k.stride()[:2],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=width // 2,
        BLOCK_HEADS=block(heads, 1),
        BLOCK_KV_HEADS=block(max(kv_heads, 1), 1),
        BLOCK_HALF=block(width // 2, 1),
        BACK=back,
        num_warps=4,
    )


@kernel()
def _rotate_heads(
    x_at: Value,
    head_stride: Value,
    c: Value,
    s: Value,
    HEADS: constexpr,
    HALF: constexpr,
    BLOCK: constexpr,
    BLOCK_HALF: constexpr,
) -> None:
    """Rotate all heads of one token; one program holds them, so that the tables' row is read once."""
    head, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS) & (column < HALF)
    at = x_at + head * head_stride + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (first * c - second * s).to(x_at.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (second * c + first * s).to(x_at.dtype.element_ty), mask=inside)


@kernel()
def _rope_kernel(
    q_at: Pointer,
    k_at: Pointer,
    cos_at: Pointer,
    sin_at: Pointer,
    position_at: Pointer,
    q_token: Value,
    q_head: Value,
    k_token: Value,
    k_head: Value,
    HEADS: constexpr,
    KV_HEADS: constexpr,
    HALF: constexpr,
    BLOCK_HEADS: constexpr,
    BLOCK_KV_HEADS: constexpr,
    BLOCK_HALF: constexpr,
    BACK: constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    row = tl.load(position_at + token).to(tl.int64) * HALF
    c = tl.load(cos_at + row + column, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin_at + row + column, mask=column < HALF, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    _rotate_heads(q_at + token * q_token, q_head, c, s, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)
    if KV_HEADS > 0:
        _rotate_heads(k_at + token * k_token, k_head, c, s, KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF)
