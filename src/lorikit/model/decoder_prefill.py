"""The prompts of requests that join, all tokens of one adapter's packed in one forward: fills their slots of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorikit.model.decoder_layer import Layer, Rows, Step, run_layer
from lorikit.model.decoder_slots import Slots
from lorikit.model.kernels.rmsnorm import rmsnorm
from lorikit.model.packed_attention import Sequences, attend

if TYPE_CHECKING:
    from lorikit.model.decoder import DecoderEngine


def prefill(
    engine: DecoderEngine,
    layers: Sequence[Layer],
    slots: Slots,
    prompts: Sequence[Sequence[int]],
    rows: Tensor,
    *,
    note: bool,
) -> Tensor:
    """Logits (N, V) float32 after the last token of each prompt, whose keys and values go to the slots in `rows` (N,).

    `note`: remember which tokens they hold, for the repetition penalty.
    """
    shape, device = engine.shape, engine.device
    counts = torch.tensor([len(p) for p in prompts])
    longest = int(counts.max())
    ids = torch.tensor([i for p in prompts for i in p]).to(device)
    owners = torch.repeat_interleave(torch.arange(len(prompts)), counts).to(device)
    owners = rows[owners]
    position_ids = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
    if note:
        slots.remember(rows, owners, ids)
    cu = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)
    whole = Sequences(cu, cu, longest, longest)
    ends = cu[1:].to(torch.int64) - 1
    one_each = torch.arange(len(prompts) + 1, device=device, dtype=torch.int32)
    last = Sequences(one_each, cu, 1, longest)

    def attend_and_keep(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = slots.layer(layer.number)
        keys[owners, :, position_ids], values[owners, :, position_ids] = k, v
        at_end = layer.number == shape.layers - 1
        return attend(q, k, v, last if at_end else whole, shape.head_dim**-0.5, layer.window)

    cos, sin = engine.rope_tables(longest)
    step = Step(cos, sin, position_ids, attend_and_keep, last=Rows(ends, None, ends))
    x = engine.weights.embed[ids]
    for layer in layers:
        x = run_layer(x, layer, step)
    return engine.weights.output.forward(rmsnorm(x, engine.weights.norm, shape.eps)).float()
