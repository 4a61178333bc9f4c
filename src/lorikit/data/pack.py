"""Examples -> Batch: sequences end to end without padding, and an optimizer step cut into as few batches as fit.

examples      [a b c] [d e]           labels        [- b c] [- e]
input_ids      a b c   d e            targets        b c -   e -      (shifted inside each sequence)
position_ids   0 1 2   0 1            cu_seqlens     0 3 5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from lorikit.data.values import IGNORE, Batch, Example


def pack(examples: Sequence[Example]) -> Batch:
    """One Batch of all examples in their order, on the CPU. At least one example, each of at least one token."""
    assert examples and all(len(e.input_ids) == len(e.labels) > 0 for e in examples)
    lengths = [len(e.input_ids) for e in examples]
    targets = torch.tensor([t for e in examples for t in (*e.labels[1:], IGNORE)])  # (T,)
    return Batch(
        input_ids=torch.tensor([t for e in examples for t in e.input_ids]),
        targets=targets,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        num_targets=int((targets != IGNORE).sum()),
    )


def num_targets(example: Example) -> int:
    """Tokens of an example that carry a loss. The first token of a sequence has nothing to be predicted from."""
    return sum(label != IGNORE for label in example.labels[1:])


def split_step(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """The examples of one optimizer step in the fewest groups of about equal size, each of at most `max_tokens` tokens.

    A single example over `max_tokens` is a group of its own. Longest first into the lightest group; inside a group the
    examples keep their order. Depends on the lengths only, so a resumed run makes the same groups.
    """
    assert examples and max_tokens > 0
    lengths = [len(e.input_ids) for e in examples]
    by_length = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    for count in range(max(1, -(-sum(lengths) // max_tokens)), len(examples) + 1):
        loads = [0] * count
        groups: list[list[int]] = [[] for _ in range(count)]
        for i in by_length:
            lightest = loads.index(min(loads))
            loads[lightest] += lengths[i]
            groups[lightest].append(i)
        if all(load <= max_tokens or len(group) == 1 for load, group in zip(loads, groups, strict=True)):
            return [[examples[i] for i in sorted(group)] for group in sorted(groups, key=min) if group]
    return [[e] for e in examples]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {f.name: getattr(batch, f.name).to(device, non_blocking=True) for f in fields(batch) if f.type == "Tensor"}
    return replace(batch, **moved)
