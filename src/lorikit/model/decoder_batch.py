"""Batch -> the tokens that a loss depends on, each computed once, and which of them the last layer needs.

Attention is causal, so what follows the last label of a sequence has no influence on any loss, and sequences without a
label have none at all. Tokens that all sequences begin with (a system prompt) have the same hidden states in each of them:
they are computed once, in front, and every sequence attends to their keys and values as to its own. The sum over the
sequences of what flows back to them is their gradient, so nothing changes but the order of sums; dropout drops the same
elements of them for all sequences of the batch. In the last layer only the tokens from the first label on ask a query, as
the last tokens of their sequence, and only the labelled ones go on to the head.

    sequences  a b c d e f   a b g h      targets  - - - x - -   - - - y      (x, y: labels; -: none)
    computed   a b | c d | g h            queries of the last layer  d, h     labelled  d, h
    keys       a b | a b c d | a b g h
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorikit.data.values import IGNORE, Batch
from lorikit.model.decoder_layer import Rows
from lorikit.model.packed_attention import Keys, Sequences

_LEAST_SAVED = 1 / 32  # of the tokens; below that gathering the keys costs as much as it saves


@dataclass(frozen=True, slots=True)
class Packed:
    """What a forward over T tokens takes. `last_sequences` are those of the last layer, whose queries `last` names."""

    input_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    last_sequences: Sequences
    last: Rows
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a batch is, on the CPU, all int64. `prefix` tokens are shared, 0 for none.

    tokens (T,) of the batch's, labelled (L,) of these T, targets (L,); N sequences, of which `firsts`, `ends` and `starts`
    (N,) are the first label, the end after the last one and the start of what is not shared, all in T.
    """

    prefix: int
    tokens: Tensor
    labelled: Tensor
    targets: Tensor
    starts: Tensor
    firsts: Tensor
    ends: Tensor

    @property
    def lengths(self) -> Tensor:
        """(N,) of the sequences, with the prefix."""
        return self.ends - self.starts + self.prefix


def lay_out(batch: Batch) -> Layout | None:
    """Which tokens are computed, in which order; None when nothing is labelled."""
    labelled = (batch.targets != IGNORE).nonzero()[:, 0]  # (L,)
    if not len(labelled):
        return None
    cu = batch.cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(cu, labelled, right=True) - 1
    used = torch.unique(sequence)
    starts = cu[used]
    firsts = labelled[torch.searchsorted(sequence, used)]
    ends = labelled[torch.searchsorted(sequence, used, right=True) - 1] + 1
    prefix = _shared(batch.input_ids, starts, int((firsts - starts).min()))
    if (len(used) - 1) * prefix < _LEAST_SAVED * int((ends - starts).sum()):
        prefix = 0
    own, cu_own = _ranges(starts + prefix, ends)
    tokens = torch.cat([torch.arange(prefix) + starts[0], own])
    begins = cu_own[:-1] + prefix
    shift = begins - starts - prefix  # from the batch's numbers to those of the T tokens
    return Layout(
        prefix=prefix,
        tokens=tokens,
        labelled=labelled + shift[torch.searchsorted(used, sequence)],
        targets=batch.targets[labelled],
        starts=begins,
        firsts=firsts + shift,
        ends=cu_own[1:] + prefix,
    )


def two_rows() -> Batch:
    """Two rows with a common beginning and labels: what is done with them is done with all rows."""
    length, shared, labelled = 64, 32, 16
    targets = torch.full((2, length), IGNORE)
    targets[:, -labelled:] = 1
    input_ids = torch.zeros(2, length, dtype=torch.int64)
    input_ids[1, shared:] = 1
    return Batch(
        input_ids=input_ids.flatten(),
        position_ids=torch.arange(length).repeat(2),
        cu_seqlens=torch.tensor([0, length, 2 * length], dtype=torch.int32),
        targets=targets.flatten(),
        max_seqlen=length,
        num_targets=2 * labelled,
    )


def cut_to_labels(batch: Batch, device: torch.device) -> Packed | None:
    """The batch on `device` without what no loss depends on; None when nothing is labelled."""
    at = lay_out(batch)
    if at is None:
        return None
    rows, cu_last = _ranges(at.firsts, at.ends)  # (S,) of the T tokens
    everything = len(rows) == len(at.labelled)
    zero = at.starts.new_zeros(1)
    cu_q = torch.cat([zero, zero + at.prefix, at.ends]) if at.prefix else torch.cat([zero, at.ends])
    cu_rows = torch.cat([zero, at.lengths.cumsum(0)])  # of the sequences' keys
    longest_q, longest_k = int((at.ends - at.firsts).max()), int(at.lengths.max())

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    keys = last_keys = None
    if at.prefix:
        index = key_index(at)
        own, copies = keys_of_tokens(at)
        cu = there(cu_q.to(torch.int32))
        last_keys = Keys(there(index), there(own), there(copies), cu[1:], 0)
        front = torch.arange(at.prefix)
        index, copies = torch.cat([front, index]), torch.cat([front[None], copies + at.prefix])
        keys = Keys(there(index), there(own + at.prefix), there(copies), cu, 1)
    on_q, on_rows = there(cu_q.to(torch.int32)), there(cu_rows.to(torch.int32))
    on_k = there(torch.cat([zero, cu_rows + at.prefix]).to(torch.int32)) if at.prefix else on_rows
    last = Rows(there(rows), None if everything else there(torch.searchsorted(rows, at.labelled)), there(at.labelled))
    return Packed(
        input_ids=there(batch.input_ids[at.tokens]),
        position_ids=there(batch.position_ids[at.tokens]),
        sequences=Sequences(on_q, on_k, max(int((at.ends - at.starts).max()), at.prefix), longest_k, keys),
        last_sequences=Sequences(there(cu_last.to(torch.int32)), on_rows, longest_q, longest_k, last_keys),
        last=last,
        targets=there(at.targets),
    )


def key_index(at: Layout) -> Tensor:
    """(sum of lengths,) which of the T tokens each sequence attends to: the prefix, then its own."""
    own, copies = keys_of_tokens(at)
    index = torch.empty(int(at.lengths.sum()), dtype=torch.int64)
    index[own] = torch.arange(at.prefix, len(at.tokens))
    index[copies] = torch.arange(at.prefix)[None]
    return index


def keys_of_tokens(at: Layout) -> tuple[Tensor, Tensor]:
    """Where tokens are in `key_index`: (T - prefix,) each own one, (N, prefix) the copies of the shared ones."""
    begins = at.lengths.cumsum(0) - at.lengths
    own, _ = _ranges(begins + at.prefix, begins + at.lengths)
    return own, begins[:, None] + torch.arange(at.prefix)[None]


def _shared(input_ids: Tensor, starts: Tensor, most: int) -> int:
    """How many tokens, at most `most`, the sequences beginning at `starts` (N,) all begin with."""
    if len(starts) < 2 or most < 1:
        return 0
    ids = input_ids[starts[:, None] + torch.arange(most)]  # (N, most)
    return int((ids == ids[:1]).all(0).long().cumprod(0).sum())


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """All numbers of the ranges one after the other, and where each range begins and ends among them (N+1,)."""
    lengths = ends - starts
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.arange(int(cu[-1])) + torch.repeat_interleave(starts - cu[:-1], lengths), cu
