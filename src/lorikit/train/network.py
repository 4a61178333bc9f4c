"""What several GPUs cost and bring: the heaviest share of a step, the bytes on the wire, the seconds they take.

    share     rows are dealt by tokens, the slowest rank sets the pace; a step cannot be shorter than its longest row
    sum       of the adapter's gradient, G = 4 bytes x parameters, once a step:  2 (N - 1) / N x G / b + 2 a log2 N
    gathers   of a sharded base's layer of w bytes, in forward and backward:     (N - 1) / N x w / b + a log2 N
    step      data parallel: share + sum         sharded: max(share, gathers) + first layer's gather + sum

N ranks, b the slowest link on the ring in bytes/s, a the time of one message. A gather runs beside the layer before it.
docs/distributed.md says where b and a are from. Nothing here was measured on several GPUs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorikit.config import ModelConfig
from lorikit.errors import ConfigError
from lorikit.model.sharded import is_sharded
from lorikit.train.plan_costs import Costs, Target
from lorikit.train.predict import Prediction, Spread

_ACHIEVED = 0.8  # of a link's data sheet
_MESSAGE, _MESSAGE_BETWEEN = 10e-6, 20e-6  # seconds inside a machine and between machines
_NIC = 50e9  # bytes/s for each GPU: 400 Gbit/s, as in machines of eight H100
_NVLINK = {"H100": 450e9, "H200": 450e9, "A100": 300e9}
_PCIE = 25e9  # bytes/s, cards without NVLink and copies from the host
_LOOPBACK, _LOOPBACK_MESSAGE = (
    1.9e9,
    100e-6,
)  # gloo between processes of a CPU (benchmarks/results/distributed_cpu.jsonl)


@dataclass(frozen=True, slots=True)
class Links:
    """The ring of N ranks: bytes/s of its slowest link, seconds of a message, bytes/s between host and device."""

    ranks: int
    bandwidth: float
    message: float
    host: float = _PCIE * _ACHIEVED

    def sum_seconds(self, size: int) -> float:
        """An all-reduce of `size` bytes."""
        if self.ranks == 1:
            return 0.0
        return 2 * (self.ranks - 1) / self.ranks * size / self.bandwidth + 2 * self.message * math.log2(self.ranks)

    def gather_seconds(self, size: int) -> float:
        """An all-gather after which each rank has `size` bytes."""
        if self.ranks == 1:
            return 0.0
        return (self.ranks - 1) / self.ranks * size / self.bandwidth + self.message * math.log2(self.ranks)


@dataclass(frozen=True, slots=True)
class Layers:
    """A base in groups as FSDP2 gathers them: bytes of one layer, how many there are, and the rest."""

    count: int
    layer: int
    rest: int


def count_ranks(gpus: int | None, nodes: int | None) -> tuple[int, int]:
    """(ranks, nodes) of `--gpus` on each of `--nodes` machines. ConfigError for counts that cannot be."""
    for name, value in (("gpus", gpus), ("nodes", nodes)):
        if value is not None and not 1 <= value <= 1 << 20:
            raise ConfigError(f"--{name} is {value}: give a whole number from 1")
    return (gpus or 1) * (nodes or 1), nodes or 1


def links_of(target: Target, ranks: int, nodes: int) -> Links:
    """The ring on these machines, from data sheets."""
    if target.kind != "cuda":
        return Links(ranks, _LOOPBACK, _LOOPBACK_MESSAGE)
    inside = next((rate for name, rate in _NVLINK.items() if name in target.name), _PCIE)
    # NCCL lays a ring through each card of a machine, so that all of them carry what goes between machines.
    slowest = min(inside, _NIC * max(1, ranks // nodes)) if nodes > 1 else inside
    return Links(ranks, slowest * _ACHIEVED, _MESSAGE_BETWEEN if nodes > 1 else _MESSAGE)


def layers_of(folder: Path, parameters: int, element: int) -> Layers:
    """The groups of a base of so many parameters, by its config.json; one layer of all where that does not say."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        count, width, words = (int(values[name]) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
        tables = 1 if values.get("tie_word_embeddings") else 2
    except (OSError, ValueError, KeyError, TypeError):
        return Layers(1, parameters * element, 0)
    rest = min(tables * words * width, parameters)
    return Layers(count, (parameters - rest) * element // max(1, count), rest * element)


def sharded_costs(costs: Costs, model: ModelConfig, layers: Layers, ranks: int) -> Costs:
    """The costs of one rank of a sharded base: its share (not with shard-offload), two layers and the rest gathered."""
    if not is_sharded(model):
        return costs
    held = 0 if model.device_map == "shard-offload" else -(-(layers.count * layers.layer + layers.rest) // ranks)
    gathered = (2 * layers.layer + layers.rest) if ranks > 1 or not held else 0
    return replace(costs, static=dict(costs.static) | {"weights": held + gathered})


def spread(
    alone: Prediction,
    part: Prediction,
    model: ModelConfig,
    layers: Layers,
    links: Links,
    nodes: int,
    *,
    shared_cpu: bool,
) -> Spread:
    """`alone`: the run on one GPU; `part`: the heaviest rank's part of it. With `shared_cpu` the ranks share one CPU."""
    ranks, sharded = links.ranks, is_sharded(model)
    gradient = 4 * sum(part.by_target.values())
    network = links.sum_seconds(gradient)
    sent = 2 * (ranks - 1) * gradient // ranks
    compute = part.time.step * (ranks if shared_cpu else 1) if part.time else None
    step = compute
    by_layer = 0
    if sharded:
        forwards = max(1.0, part.steps.forwards_mean)
        by_layer = round(2 * forwards * (ranks - 1) * layers.layer / ranks)
        sent += layers.count * by_layer + round(forwards * (ranks - 1) * layers.rest / ranks)
        gathers = forwards * (2 * layers.count * links.gather_seconds(layers.layer) + links.gather_seconds(layers.rest))
        if model.device_map == "shard-offload":
            whole = layers.count * layers.layer + layers.rest
            gathers = max(gathers, 2 * forwards * whole / ranks / links.host)
        first = forwards * (links.gather_seconds(layers.layer) + links.gather_seconds(layers.rest))
        network += max(0.0, gathers - (compute or 0.0)) + first
    step = None if compute is None else compute + network
    speed = part.steps.tokens_mean / step if step else None
    fits_alone = alone.fits is not False and not sharded
    efficiency = speed / alone.time.tokens_per_second / ranks if speed and alone.time and fits_alone else None
    return Spread(ranks, nodes, sharded, compute, network, step, speed, efficiency, sent, by_layer)


def on_ranks(part: Prediction, found: Spread) -> Prediction:
    """The prediction for all ranks: memory of the heaviest, times with the network."""
    time = part.time
    if time is None or found.step is None or found.tokens_per_second is None:
        return replace(part, spread=found)
    more = part.steps.count * (found.step - time.step)
    shared = replace(time, step=found.step, total=time.total + more, tokens_per_second=found.tokens_per_second)
    return replace(part, time=shared, spread=found)


def spread_rows(found: Spread) -> Sequence[tuple[str, str, str]]:
    """Rows for the table of `lorikit plan`: label, figure, meaning."""
    where = f"on {found.nodes} machines" if found.nodes > 1 else "on one machine"
    rows = [("GPUs", f"{found.ranks:,}", f"{where}, figures of memory are of each; times of several GPUs are computed")]
    sent = f"{found.sent_bytes / 1e6:,.0f} MB"
    layer = f", {found.by_layer_bytes / 1e6:,.0f} MB of it for each layer" if found.sharded else ""
    share = "" if found.network_share is None else f", waited for in {found.network_share:.1%} of a step"
    rows.append(("network", sent, f"sent by each GPU in a step{layer}{share}"))
    if found.efficiency is not None:
        rows.append(
            ("efficiency", f"{found.efficiency:.0%}", f"of {found.ranks} times one GPU with the same rows a step")
        )
    return rows
