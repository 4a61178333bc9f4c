"""Batch -> the tokens that a loss depends on, and which of them the last layer needs.

Attention is causal, so what follows the last label of a sequence has no influence on any loss, and sequences without a
label have none at all. In the last layer only the tokens from the first label on ask a query, as the last tokens of their
sequence, and only the labelled ones go on to the head.

    sequence   a b c d e f      targets    - - x - y -        (x, y: labels; -: none)
    computed   a b c d e        queries    c d e              labelled   c e
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorikit.data.values import IGNORE, Batch
from lorikit.model.decoder_layer import Rows
from lorikit.model.packed_attention import Sequences


@dataclass(frozen=True, slots=True)
class Packed:
    """What a forward over T tokens takes. `last_sequences` are those of the last layer, whose queries `last` names."""

    input_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    last_sequences: Sequences
    last: Rows
    targets: Tensor


def cut_to_labels(batch: Batch, device: torch.device) -> Packed | None:
    """The batch on `device` without the tokens that no loss depends on; None when nothing is labelled."""
    labelled = (batch.targets != IGNORE).nonzero()[:, 0]  # (L,)
    if not len(labelled):
        return None
    cu = batch.cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(cu, labelled, right=True) - 1
    used = torch.unique(sequence)
    starts = cu[used]
    firsts = labelled[torch.searchsorted(sequence, used)]
    ends = labelled[torch.searchsorted(sequence, used, right=True) - 1] + 1
    tokens, cu_k = _ranges(starts, ends)  # (T,) of the batch's tokens
    rows, cu_q = _ranges(cu_k[1:] - (ends - firsts), cu_k[1:])  # (S,) of these T
    outputs = torch.searchsorted(tokens, labelled)
    everything = len(rows) == len(outputs)
    longest_q, longest_k = int((ends - firsts).max()), int((ends - starts).max())

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    last = Rows(there(rows), None if everything else there(torch.searchsorted(rows, outputs)), there(outputs))
    on_k, on_q = there(cu_k.to(torch.int32)), there(cu_q.to(torch.int32))
    return Packed(
        input_ids=there(batch.input_ids[tokens]),
        position_ids=there(batch.position_ids[tokens]),
        sequences=Sequences(on_k, on_k, longest_k, longest_k),
        last_sequences=Sequences(on_q, on_k, longest_q, longest_k),
        last=last,
        targets=there(batch.targets[labelled]),
    )


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """All numbers of the ranges one after the other, and where each range begins and ends among them (N+1,)."""
    lengths = ends - starts
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.arange(int(cu[-1])) + torch.repeat_interleave(starts - cu[:-1], lengths), cu
