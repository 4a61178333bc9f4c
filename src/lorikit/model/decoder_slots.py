"""What S requests that are answered side by side have on the device: keys and values of their tokens, and how each goes on.

    cache (N layers, 2, S, K, P, E)   of slot s the first length[s] of P positions hold something
    last, length, place, seed, adapter (S+1,) int64      values (S+1, 5) float32      seen (S+1, V) bool

The row after the last slot belongs to nobody: batches are filled up with it. Addresses stay, so that CUDA graphs can be
captured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorikit.errors import OutOfMemoryError
from lorikit.model.decoder_config import DecoderShape
from lorikit.model.engine import Sampling
from lorikit.model.sampling import Choice
from lorikit.model.sampling import values as sampling_values


@dataclass(slots=True)
class Slots:
    """The state of `count` slots of `positions` tokens each. `seen` is there once a request has a repetition penalty."""

    shape: DecoderShape
    count: int
    positions: int
    cache: Tensor
    last: Tensor
    length: Tensor
    place: Tensor
    seed: Tensor
    adapter: Tensor
    values: Tensor
    seen: Tensor | None = field(default=None)

    @classmethod
    def allocate(
        cls, shape: DecoderShape, count: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> Slots:
        """Empty slots. OutOfMemoryError says how many would fit."""
        size = (shape.layers, 2, count, shape.kv_heads, positions, shape.head_dim)
        each = 2 * shape.layers * shape.kv_heads * shape.head_dim * positions * dtype.itemsize
        try:
            cache = torch.empty(size, dtype=dtype, device=device)
        except RuntimeError as error:  # of a CPU too, where torch has no class of its own for it
            if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            fit = f"{free // each} would fit" if free >= each else "not one fits"
            raise OutOfMemoryError(
                f"the keys and values of {count} answers of {positions} tokens take {count * each / 2**30:.1f} GiB on "
                f"{device}, {each / 2**30:.2f} GiB each: {fit if device.type == 'cuda' else 'too much for it'}; take "
                "fewer at a time or a smaller longest length"
            ) from None
        last, length, place, seed, adapter = torch.zeros(5, count + 1, dtype=torch.int64, device=device)
        greedy = sampling_values(Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0))
        values = torch.tensor([greedy] * (count + 1)).to(device)  # what fills a batch has to choose as well
        return cls(shape, count, positions, cache, last, length, place, seed, adapter, values)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values (S, K, P, E) of a layer."""
        return self.cache[number, 0], self.cache[number, 1]

    def choice(self, rows: Tensor | list[int], modes: tuple[bool, bool, bool]) -> Choice:
        """How the slots in `rows` (B,) choose their next token."""
        return Choice.rows(self.values[rows], self.seed[rows], self.place[rows], modes)

    def seen_in(self, rows: Tensor | list[int]) -> Tensor | None:
        """(B, V) bool: which tokens the slots hold."""
        return None if self.seen is None else self.seen[rows]

    def put(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        values: Sequence[Sequence[float]],
        seeds: Sequence[int],
        adapters: Sequence[int],
    ) -> Tensor:
        """Begin requests with prompts of these lengths in these slots; their rows (B,) on the device."""
        device = self.last.device
        rows, length, seed, adapter = (
            torch.tensor([slots, lengths, seeds, adapters], dtype=torch.int64).to(device).unbind()
        )
        self.length[rows], self.seed[rows], self.adapter[rows], self.place[rows] = length, seed, adapter, 0
        self.values[rows] = torch.tensor(values, dtype=torch.float32).to(device)
        return rows

    def remember(self, rows: Tensor, owners: Tensor, ids: Tensor) -> None:
        """Note the tokens `ids` (T,) of the prompts in `rows`; `owners` (T,) is the slot of each."""
        if self.seen is None:
            size = (self.count + 1, self.shape.vocabulary)
            self.seen = torch.zeros(size, dtype=torch.bool, device=self.last.device)
        self.seen[rows] = False
        self.seen[owners, ids] = True

    def advance(self, rows: Tensor | list[int], chosen: Tensor, *, decoded: bool, penalises: bool) -> None:
        """Note the token that each slot in `rows` has chosen; `decoded`: after a token of its own, not after the prompt."""
        self.last[rows] = chosen
        self.place[rows] += 1
        if decoded:
            self.length[rows] += 1
        if penalises and self.seen is not None:
            # Not `= True`, which copies from the host: no graph can hold that.
            self.seen[rows, chosen] = torch.ones_like(chosen, dtype=torch.bool)
