"""Generation with the decoder: prompts packed in one forward, then one token a step for all unfinished sequences.

The cache holds the keys and values of N sequences side by side, (N, P, K, E) a layer, each filled from the left; P grows
when the longest sequence reaches it, and finished sequences leave it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorikit.model.decoder_layer import Layer, Rows, Step
from lorikit.model.engine import Sampling, Token
from lorikit.model.kernels.rmsnorm import rmsnorm
from lorikit.model.packed_attention import Sequences, attend
from lorikit.model.sampling import next_tokens
from lorikit.model.streaming import BATCH

if TYPE_CHECKING:
    from lorikit.model.decoder import DecoderEngine

_GROWTH = 256  # positions that the cache grows by


def stream_tokens(
    engine: DecoderEngine, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[Token]:
    """Tokens of all prompts, `BATCH` prompts of like length at a time."""
    generator = torch.Generator(engine.device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        names = order[start : start + BATCH]
        sequences = _Sequences(engine, [prompts[i] for i in names])
        for count in range(1, sampling.max_new_tokens + 1):
            ids = sequences.next(sampling, generator)
            finishes = [
                "stop" if i in stop_ids else "length" if count == sampling.max_new_tokens else None for i in ids
            ]
            for name, token, finish in zip(names, ids, finishes, strict=True):
                yield Token(name, token, finish)
            left = [row for row, finish in enumerate(finishes) if finish is None]
            if not left:
                break
            if len(left) < len(names):
                names = [names[row] for row in left]
                sequences.keep(left)


class _Sequences:
    """N sequences on their way: their cache, what they hold, and the logits of their next tokens."""

    def __init__(self, engine: DecoderEngine, prompts: Sequence[Sequence[int]]) -> None:
        self.engine = engine
        shape, device = engine.shape, engine.device
        counts = torch.tensor([len(p) for p in prompts])
        longest = int(counts.max())
        size = (len(prompts), longest + _GROWTH, shape.kv_heads, shape.head_dim)
        dtype = engine.weights.embed.dtype
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.lengths = counts.to(device)  # (N,) positions of the cache that hold something
        self.longest = longest
        self.seen = torch.zeros(len(prompts), shape.vocabulary, dtype=torch.bool, device=device)
        self.chosen: Tensor | None = None
        self.logits = self._prefill(prompts, counts)

    def next(self, sampling: Sampling, generator: torch.Generator) -> list[int]:
        """Choose the next token of each sequence."""
        if self.chosen is not None:
            self.logits = self._decode(self.chosen)
        self.chosen = next_tokens(self.logits, self.seen, sampling, generator)
        self.seen.scatter_(1, self.chosen[:, None], True)
        return [int(i) for i in self.chosen.tolist()]

    def keep(self, rows: list[int]) -> None:
        """Let the other sequences go."""
        index = torch.tensor(rows, device=self.engine.device)
        self.keys = [t[index] for t in self.keys]
        self.values = [t[index] for t in self.values]
        self.lengths, self.seen = self.lengths[index], self.seen[index]
        if self.chosen is not None:
            self.chosen = self.chosen[index]

    @torch.no_grad()
    def _prefill(self, prompts: Sequence[Sequence[int]], counts: Tensor) -> Tensor:
        """All prompts in one forward; logits (N, V) float32 after the last token of each."""
        shape, device = self.engine.shape, self.engine.device
        ids = torch.tensor([i for p in prompts for i in p], device=device)
        row = torch.repeat_interleave(torch.arange(len(prompts)), counts).to(device)
        position_ids = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
        self.seen[row, ids] = True
        cu = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)
        whole = Sequences(cu, cu, self.longest, self.longest)
        ends = cu[1:].to(torch.int64) - 1
        one_each = torch.arange(len(prompts) + 1, device=device, dtype=torch.int32)
        last = Sequences(one_each, cu, 1, self.longest)

        def attend_and_keep(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer.number][row, position_ids] = k
            self.values[layer.number][row, position_ids] = v
            at_end = layer.number == shape.layers - 1
            return attend(q, k, v, last if at_end else whole, shape.head_dim**-0.5, layer.window)

        cos, sin = self.engine.rope_tables(self.longest)
        step = Step(cos, sin, position_ids, attend_and_keep, last=Rows(ends, None, ends))
        return self._head(self.engine.run(ids, step))

    @torch.no_grad()
    def _decode(self, ids: Tensor) -> Tensor:
        """One more token (N,) of each sequence; logits (N, V) float32 after it."""
        shape, device = self.engine.shape, self.engine.device
        if int(self.longest) == self.keys[0].shape[1]:
            more = (0, 0, 0, 0, 0, _GROWTH)
            self.keys = [torch.nn.functional.pad(t, more) for t in self.keys]
            self.values = [torch.nn.functional.pad(t, more) for t in self.values]
        self.longest += 1
        positions = self.lengths
        rows = torch.arange(len(ids), device=device)
        back = positions[:, None] - torch.arange(self.longest, device=device)[None]  # (N, P)

        def attend_cached(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """q (N, H, E), k and v (N, K, E) of one new token a sequence -> (N, H, E), over all that is cached."""
            keys, values = self.keys[layer.number], self.values[layer.number]
            keys[rows, positions], values[rows, positions] = k, v
            mask = (back >= 0) & (back < (layer.window or self.longest))
            out = scaled_dot_product_attention(
                q[:, :, None],
                keys[:, : self.longest].transpose(1, 2),
                values[:, : self.longest].transpose(1, 2),
                attn_mask=mask[:, None, None],
                scale=shape.head_dim**-0.5,
                enable_gqa=shape.heads != shape.kv_heads,
            )
            return out[:, :, 0]

        cos, sin = self.engine.rope_tables(self.longest)
        hidden = self.engine.run(ids, Step(cos, sin, positions, attend_cached))
        self.lengths = positions + 1
        return self._head(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        w = self.engine.weights
        return (rmsnorm(hidden, w.norm, self.engine.shape.eps) @ w.head.T).float()
