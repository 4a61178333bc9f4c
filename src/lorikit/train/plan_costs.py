"""Which machine a run is planned for, and its engine as a model of costs: one interface for both engines.

Choosing the engine is load_engine's own choice; of the model only config.json and the headers of safetensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lorikit.config import ModelConfig, RunConfig
from lorikit.errors import ConfigError, ModelError
from lorikit.model import decoder_load
from lorikit.model.decoder import GRAPH_TOKENS
from lorikit.model.decoder_config import LINEAR
from lorikit.model.decoder_graph import bucket_for
from lorikit.model.decoder_memory import Keep, choose, keeps_turned
from lorikit.model.engine import BEST_TOKENS, BEST_TOKENS_CPU
from lorikit.model.load import pick_device, pick_dtype
from lorikit.model.sharded import is_sharded
from lorikit.train import cost_decoder
from lorikit.train.cost import (
    GIB,
    GPUS,
    Forward,
    Ledger,
    Rates,
    Row,
    Stored,
    cut_forward_of,
    forward_of,
    known_gpu,
    measure_cpu,
    renamed,
)

if TYPE_CHECKING:
    from lorikit.hub import Resolved

CONTEXT = GIB // 2
"""Bytes that a process on a GPU takes beside its tensors: the driver's context and the loaded kernels."""
Levels = Callable[[int], tuple[Keep, ...]]
"""How much each layer keeps in a forward of so many tokens."""
_STORED: Mapping[str, Stored] = {"fp8": Stored(1.0, 4.0, 1.0, 1.7), "nf4": Stored(0.52, 0.0, 2.0)}
_HEAP = 1 << 28  # what a CPU's process holds more than its tensors, through transformers' many small ones
_LIBRARIES = 1 << 26  # workspace of the library of products, on each stream


@dataclass(frozen=True, slots=True)
class Target:
    """The machine: `memory` in bytes (None: not known, or a CPU's), `rates` None where its speed is not known."""

    kind: Literal["cuda", "cpu", "mps"]
    name: str
    memory: int | None
    rates: Rates | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Costs:
    """An engine's costs. `static` bytes by part; `train` and `evaluate` write one forward to a ledger, `train` returning
    the bytes kept by each layer; `sizes` and `eval_sizes` are those of rows in one forward. `samples`: how many forwards
    of different sizes are to be timed; `best_tokens` of a forward where the settings give no limit."""

    engine: str
    choice: str
    base_parameters: int
    by_target: dict[str, int]
    num_tensors: int
    static: dict[str, int]
    train: Callable[[Forward, Ledger], list[int]]
    evaluate: Callable[[Forward, Ledger], object]
    sizes: Callable[[Sequence[Row]], Forward]
    eval_sizes: Callable[[Sequence[Row]], Forward]
    samples: int
    best_tokens: int


def choose_target(model: ModelConfig, gpu: str | None, memory_gib: float | None, seconds: float = 0.5) -> Target:
    """The GPU that is named, else one with `memory_gib`, else this machine's device as model.device picks it.

    A CPU's speed is measured, which takes `seconds`. ConfigError for a GPU that is not in the table, a memory that is
    none, or a device that is not there.
    """
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise ConfigError(f"--memory-gib is {memory_gib:g}: give the GPU's memory in GiB, such as 24")
    memory = None if memory_gib is None else round(memory_gib * GIB)
    half = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype)
    if gpu is not None:
        rates = known_gpu(gpu)
        if rates is None:
            raise ConfigError(f"--gpu is {gpu!r}: known are {', '.join(GPUS)}; for others give --memory-gib alone")
        return Target("cuda", rates.name, memory or rates.memory, rates, half)
    if memory and not torch.cuda.is_available():
        return Target("cuda", f"a GPU of {memory_gib:g} GiB", memory, None, half)
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    if device.type == "cuda":
        numbers = (
            range(torch.cuda.device_count())
            if model.device_map is not None and not is_sharded(model)
            else [device.index or 0]
        )
        cards = [torch.cuda.get_device_properties(number) for number in numbers]
        total = memory or sum(card.total_memory for card in cards)
        rates = known_gpu(cards[0].name)
        return Target("cuda", cards[0].name, total, rates and renamed(rates, cards[0].name, total), dtype)
    if device.type == "mps":
        return Target("mps", "Apple GPU", memory, None, dtype)
    return Target("cpu", "CPU", memory, measure_cpu(dtype.itemsize, seconds), dtype)


def costs_of(config: RunConfig, base: Resolved, target: Target) -> Costs:
    """The engine that `load_engine` would take, as costs. Raises ConfigError for targets that match nothing, ModelError
    for a model or an adapter that cannot be used."""
    model, choice = config.model, ""
    adapter = Path(config.lora.init_adapter) if config.lora.init_adapter else None
    if model.engine != "generic":
        plan = decoder_load.plan(model, base, adapter, config.lora, torch.device(target.kind))
        if not isinstance(plan, str):
            return _decoder(plan, config, target)
        if model.engine == "decoder":
            raise ModelError(f"{base.name}: the decoder cannot take it, {plan}; set model.engine: auto or generic")
        choice = plan
    return _generic(config, base, target, choice)


def _stored(config: RunConfig, target: Target) -> Stored:
    """How the linear weights are stored."""
    return _STORED.get(config.model.quantization, Stored(target.dtype.itemsize))


def _decoder(plan: decoder_load.Plan, config: RunConfig, target: Target) -> Costs:
    assert plan.values is not None
    shape, element, on_gpu = plan.shape, target.dtype.itemsize, target.kind == "cuda"
    names: list[set[str]] = [set() for _ in range(shape.layers)]
    for module in plan.modules:
        parts = module.split(".")  # model.layers.3.self_attn.q_proj
        names[int(parts[2])].add(parts[-1])
    rank = int(plan.values["r"])
    highest = Keep.INPUT if config.train.gradient_checkpointing else Keep.ALL if on_gpu else Keep.GATE_UP
    cost = cost_decoder.DecoderCost(
        shape=shape,
        modules=tuple(map(frozenset, names)),
        rank=rank,
        dropout=float(plan.values.get("lora_dropout") or 0.0),
        keep=(highest,) * shape.layers,
        element=element,
        adapter_element=element if on_gpu else 4,
        kernels=on_gpu,
        linear=_stored(config, target),
    )
    static = cost_decoder.static_bytes(cost)
    if on_gpu and target.memory and config.model.quantization == "fp8":
        turned = keeps_turned(shape, _free(config, target, static) + round(shape.linear_weights() * cost.linear.copied))
        if turned:
            cost = replace(cost, linear=replace(cost.linear, copied=0.0, kept=1.0))
            static = cost_decoder.static_bytes(cost)
    levels = _levels(cost, config, target, static) if on_gpu and target.memory else None
    graphs = on_gpu and element == 2 and shape.head_dim % 8 == 0
    libraries = {"libraries": _LIBRARIES * (2 if graphs else 1)} if on_gpu else {}
    by_target = {
        name: sum(rank * sum(shape.linear(name)) for layer in cost.modules if name in layer)
        for name in LINEAR
        if any(name in layer for layer in cost.modules)
    }
    return Costs(
        engine="decoder",
        choice="",
        base_parameters=sum(cost_decoder.base_parameters(shape)),
        by_target=by_target,
        num_tensors=2,
        static=static | libraries,
        train=partial(_train_decoder, cost, levels),
        evaluate=partial(cost_decoder.evaluation, cost),
        sizes=partial(_bucketed, levels) if graphs else cut_forward_of,
        eval_sizes=cut_forward_of,
        samples=16,
        best_tokens=_best_tokens(highest, levels) if on_gpu else BEST_TOKENS_CPU,
    )


def _levels(cost: cost_decoder.DecoderCost, config: RunConfig, target: Target, static: Mapping[str, int]) -> Levels:
    """As DecoderEngine.levels: what is free once weights and adapter are there, within model.gpu_memory_gib."""
    free = _free(config, target, static)
    return lambda tokens: choose(cost.shape, tokens, free, cost.element, cost.keep[0])


def _free(config: RunConfig, target: Target, static: Mapping[str, int]) -> int:
    """What is free beside weights and adapter, within model.gpu_memory_gib."""
    assert target.memory is not None
    limit = config.model.gpu_memory_gib
    most = target.memory - CONTEXT if limit is None else min(target.memory - CONTEXT, int(limit * GIB))
    return most - sum(static.values())


def _best_tokens(highest: Keep, levels: Levels | None) -> int:
    """As DecoderEngine.best_tokens."""
    tokens = BEST_TOKENS
    while levels and tokens > 4096 and levels(tokens)[0] < min(Keep.GATE_UP, highest):
        tokens //= 2
    return tokens


def _train_decoder(
    cost: cost_decoder.DecoderCost, levels: Levels | None, forward: Forward, ledger: Ledger
) -> list[int]:
    keep = levels(forward.tokens) if levels else cost.keep
    return cost_decoder.training(replace(cost, keep=keep), forward, ledger)


def _bucketed(levels: Levels | None, rows: Sequence[Row]) -> Forward:
    """The bucket of a CUDA graph that these rows are put into, or their own sizes where they are too many for one."""
    tokens, labels = sum(row.tokens for row in rows), sum(row.labels for row in rows)
    if tokens > GRAPH_TOKENS or not labels or (levels and levels(tokens)[0] == Keep.HOST):
        return cut_forward_of(rows)
    bucket = bucket_for(tokens, labels, len(rows), max(row.tokens for row in rows))
    empty = (0,) * (bucket.sequences - len(rows) - 1)
    lengths = (*(row.tokens for row in rows), bucket.tokens - tokens, *empty)
    return Forward(lengths, lengths, bucket.labels, bucket=True)


def _generic(config: RunConfig, base: Resolved, target: Target, choice: str) -> Costs:
    from lorikit.train import cost_generic

    on_gpu = target.kind == "cuda"
    checkpoint = config.train.gradient_checkpointing
    model, wrapped = cost_generic.build(
        config.model, base.path, target.dtype, config.lora, checkpoint=checkpoint, kernels=on_gpu
    )
    by_target: dict[str, int] = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            module = name.partition(".lora_")[0].rpartition(".")[2]
            by_target[module] = by_target.get(module, 0) + parameter.numel()
    linear = _stored(config, target)
    plain = linear.per_weight == target.dtype.itemsize
    return Costs(
        engine="generic",
        choice=choice,
        base_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        by_target=by_target,
        num_tensors=sum(p.requires_grad for p in wrapped.parameters()),
        static=cost_generic.static_bytes(model, wrapped, None if plain else linear)
        | {"libraries": _LIBRARIES if on_gpu else _HEAP},
        train=partial(cost_generic.run, model, wrapped, training=True, kernels=on_gpu),
        evaluate=partial(cost_generic.run, model, wrapped, training=False, kernels=on_gpu),
        sizes=forward_of,
        eval_sizes=forward_of,
        samples=1,
        best_tokens=BEST_TOKENS if target.kind != "cpu" else BEST_TOKENS_CPU,
    )
