"""One state on all ranks: rank 0's checkpoint reaches the others over the network, and none may drift away from it.

Only rank 0 needs to see the run folder, so machines need no common disk.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
from torch import Tensor

from lorikit.errors import ModelError
from lorikit.model.engine import Engine
from lorikit.train.adamw import MOMENTS, AdamW
from lorikit.train.checkpoint import State
from lorikit.train.distributed import Ranks


def share_state(ranks: Ranks, state: State, engine: Engine, optimizer: AdamW) -> State:
    """Give every rank the adapter, the optimizer and the State of rank 0. Raises LostRank."""
    moments = optimizer.state() if ranks.first else {}
    told = ranks.text({"state": asdict(state), "begun": bool(moments)})
    adapter = engine.adapter_state()
    ranks.copy(list(adapter.values()))
    if not ranks.first:
        engine.load_adapter_state(adapter)
    if told["begun"]:
        moments = moments or _empty_moments(engine)
        ranks.copy([moments[name] for name in sorted(moments)])
        if not ranks.first:
            optimizer.load_state(moments)
    return State(**told["state"])


def check_same(ranks: Ranks, engine: Engine) -> None:
    """ModelError unless every rank holds the same adapter, to the bit."""
    digest = hashlib.sha256()
    for value in engine.adapter_state().values():
        digest.update(value.numpy().tobytes())
    number = int.from_bytes(digest.digest()[:6], "big")  # 48 bits, which float64 holds exactly
    told = ranks.numbers(number)
    others = [rank for rank, value in enumerate(told) if value != told[0]]
    if others:
        raise ModelError(
            f"the adapters of ranks {', '.join(map(str, others))} are not that of rank 0; nothing was saved. Machines whose "
            "GPUs or versions of torch differ round differently: use equal ones"
        )


def _empty_moments(engine: Engine) -> dict[str, Tensor]:
    """Tensors as in `AdamW.state`, to be filled."""
    shapes = {name: p.shape for name, p in zip(engine.parameter_names(), engine.parameters(), strict=True)}
    return {
        f"{moment}.{name}": torch.zeros(() if moment == "step" else shape)
        for name, shape in shapes.items()
        for moment in MOMENTS
    }
