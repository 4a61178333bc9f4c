"""Memory of each GPU, tokens/s and the network's share for 8 to 1,024 H100, computed; the table of docs/distributed.md.

    python benchmarks/scale_table.py

Adapters r 8 on all seven linears, rows of 4,096 tokens, one a GPU and step, gradient checkpointing, bfloat16, eight GPUs in a
machine. Compute: 6 x parameters x tokens floating-point operations (forward, forward again, backward to the inputs) at the
rate of train/cost.py; the network by train/network.py. Nothing in it was measured.
"""

from __future__ import annotations

import torch

from lorikit.train.cost import GIB, GPUS
from lorikit.train.network import Layers, Links, links_of
from lorikit.train.plan_costs import Target

TOKENS = 4096
MODELS = {  # hidden, intermediate, layers, key-value width, vocabulary: config.json of Llama 3.1
    "8B": (4096, 14336, 32, 1024, 128256),
    "70B": (8192, 28672, 80, 1024, 128256),
    "405B": (16384, 53248, 126, 1024, 128256),
}


def main() -> None:
    rates = GPUS["h100"]
    target = Target("cuda", rates.name, rates.memory, rates, torch.bfloat16)
    print("| base | GPUs | base is | GiB a GPU | tokens/s, all | network, share of a step | MB sent a GPU and step |")
    print("|---|---|---|---|---|---|---|")
    for name, (hidden, middle, count, narrow, words) in MODELS.items():
        layer = 2 * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * middle)
        layers = Layers(count, layer, 2 * 2 * words * hidden)
        adapter = count * 8 * (2 * 2 * hidden + 2 * (hidden + narrow) + 3 * (hidden + middle))
        for ranks in (8, 64, 256, 1024):
            links = links_of(target, ranks, ranks // 8)
            for sharded in (False, True):
                held = memory(layers, adapter, hidden, middle, ranks, sharded=sharded)
                if sharded and name == "8B" and ranks > 8:
                    continue
                if not sharded and name != "8B" and ranks > 8:
                    continue
                fits = held < rates.memory
                speed, share, sent = times(layers, adapter, links, rates.matmul, sharded=sharded)
                shown = f"{speed:,.0f} | {share:.1%} | {sent / 1e6:,.0f}" if fits else "does not fit | |"
                how = "sharded" if sharded else "whole on each"
                print(f"| {name} | {ranks:,} | {how} | {held / GIB:,.0f} | {shown} |")


def memory(layers: Layers, adapter: int, hidden: int, middle: int, ranks: int, *, sharded: bool) -> float:
    whole = layers.count * layers.layer + layers.rest
    weights = whole / ranks + 2 * layers.layer + layers.rest if sharded else whole
    kept = 2 * TOKENS * hidden * layers.count  # the inputs of the layers
    working = 2 * TOKENS * (12 * hidden + 6 * middle)
    logits = 6 * TOKENS * 128256
    return weights + 18 * adapter + kept + working + logits + GIB / 2


def times(layers: Layers, adapter: int, links: Links, rate: float, *, sharded: bool) -> tuple[float, float, float]:
    parameters = (layers.count * layers.layer + layers.rest) / 2
    compute = 6 * parameters * TOKENS / rate
    network = links.sum_seconds(4 * adapter)
    part = (links.ranks - 1) / links.ranks
    sent = 2 * part * 4 * adapter
    if sharded:
        gathers = 2 * layers.count * links.gather_seconds(layers.layer) + links.gather_seconds(layers.rest)
        network += max(0.0, gathers - compute)
        network += links.gather_seconds(layers.layer) + links.gather_seconds(layers.rest)
        sent += part * (2 * layers.count * layers.layer + layers.rest)
    return links.ranks * TOKENS / (compute + network), network / (compute + network), sent


if __name__ == "__main__":
    main()
