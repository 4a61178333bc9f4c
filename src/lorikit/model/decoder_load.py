"""Whether the decoder takes a model, an adapter and their settings, and the engine that it then is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.config import LoraSettings, ModelConfig
from lorikit.errors import OutOfMemoryError
from lorikit.model import lora
from lorikit.model.decoder_config import DecoderShape, decoder_shape, supported
from lorikit.model.decoder_memory import Keep

if TYPE_CHECKING:
    import torch

    from lorikit.hub import Resolved
    from lorikit.model.decoder import DecoderEngine
    from lorikit.model.decoder_adapter import Adapter


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load: the base, and the adapter's settings, modules and folder (None: a new one), if there is any."""

    base: Resolved
    shape: DecoderShape
    adapter: Path | None
    values: Mapping[str, Any] | None
    modules: tuple[str, ...]
    trainable: bool
    quantization: str = "none"
    merged: Path | None = None
    """The folder of an adapter that is folded into the base; then `adapter` is None."""


def plan(
    config: ModelConfig, base: Resolved, adapter: Path | None, new: LoraSettings | None, device: torch.device
) -> Plan | str:
    """What the decoder has to load, or why it cannot. Raises ConfigError for targets that match nothing, ModelError for
    an adapter folder that cannot be read."""
    reason = _settings_reason(config, new, device)
    shape = reason or _shape(base.path)
    if isinstance(shape, DecoderShape) and config.quantization == "fp8" and device.type == "cuda":
        shape = _fp8_reason(shape) or shape
    if isinstance(shape, str):
        return shape
    quantization = config.quantization
    if adapter is not None:
        values = lora.read_config(adapter)
        return _with_adapter(Plan(base, shape, adapter, values, (), new is not None, quantization))
    if new is None:
        return Plan(base, shape, None, None, (), False, quantization)
    targets = lora.choose_targets(shape.linear_names(), new.target_modules)
    return Plan(base, shape, None, _new_values(new, targets), _modules(shape, targets), True, quantization)


def load(
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int,
    checkpoint: bool,
    gpu_memory_gib: float | None = None,
) -> DecoderEngine:
    """The engine. ModelError for damaged weights or an adapter that does not fit, OutOfMemoryError where the weights do
    not fit the device."""
    import torch

    from lorikit.model.decoder import DecoderEngine, free_bytes
    from lorikit.model.decoder_weights import allocate, fill, keep_turned, pack
    from lorikit.model.kernels.launch import start_compiler
    from lorikit.model.lora_fold import read_updates, stored_tensors

    base, shape = plan.base, plan.shape
    # On a CPU the norms cost little, and what is not kept is not written and read again.
    highest = Keep.INPUT if checkpoint else Keep.GATE_UP if device.type == "cpu" else Keep.ALL
    gpu_bytes = None if gpu_memory_gib is None else int(gpu_memory_gib * 2**30)
    engine = None
    if device.type == "cuda":
        start_compiler(device)  # needs seconds, beside the reading of weights
    try:
        weights = allocate(shape, dtype, device, plan.quantization)
        adapter = _adapter(plan, dtype, device, seed)
        if plan.quantization == "fp8" and device.type == "cuda" and plan.trainable:
            keep_turned(weights, shape, free_bytes(device, gpu_bytes))
        if (
            device.type == "cuda" and plan.trainable and plan.quantization != "nf4"
        ):  # which has nothing before it is filled
            engine = DecoderEngine(shape, weights, adapter, highest=highest, gpu_bytes=gpu_bytes)
            engine.rehearse()
        updates = {} if plan.merged is None else read_updates(plan.merged, stored_tensors(base.path))
        fill(weights, base.path, shape, device, updates)
    except torch.OutOfMemoryError as error:
        what = str(dtype).removeprefix("torch.") if plan.quantization == "none" else plan.quantization
        smaller = {"none": "model.quantization: nf4, or model.device_map: auto", "fp8": "model.quantization: nf4"}
        todo = f"set {smaller[plan.quantization]}, or " if plan.quantization in smaller else ""
        raise OutOfMemoryError(
            f"{base.name} in {what} does not fit {device}: {str(error).splitlines()[0]}; {todo}take a smaller model"
        ) from None
    if device.type == "cpu" and not plan.trainable:
        given = [weights]
        del weights  # each layer is forgotten as it was when it is packed
        weights = pack(given.pop(), shape)
    return engine or DecoderEngine(shape, weights, adapter, highest=highest, gpu_bytes=gpu_bytes)


def _adapter(plan: Plan, dtype: torch.dtype, device: torch.device, seed: int) -> Adapter | None:
    """The adapter, new or from its folder. ModelError where it does not fit the base."""
    import torch

    from lorikit.model.decoder_adapter import Adapter

    if plan.values is None:
        return None
    # On a CPU the adapter's products are in float32 whatever the base is, as peft has them.
    compute = dtype if device.type == "cuda" else torch.float32
    adapter = Adapter(plan.shape, plan.modules, plan.values, device=device, dtype=compute, trainable=plan.trainable)
    if plan.adapter is None:
        adapter.initialise(seed)
    else:
        adapter.load(lora.read_weights(plan.adapter), f"{plan.adapter} does not fit the base {plan.base.name}")
    return adapter


def _settings_reason(config: ModelConfig, new: LoraSettings | None, device: torch.device) -> str | None:
    for name in ("device_map", "attn_implementation"):
        if getattr(config, name) is not None:
            return f"model.{name} is set"
    if config.trust_remote_code:
        return "model.trust_remote_code is on"
    if device.type not in ("cpu", "cuda"):
        return f"the device is {device}"
    if new is not None and new.init_lora_weights is not True:
        return f"lora.init_lora_weights is {new.init_lora_weights}"
    return None


def _fp8_reason(shape: DecoderShape) -> str | None:
    from lorikit.model.kernels.fp8 import MULTIPLE

    widths = {"hidden_size": shape.hidden, "intermediate_size": shape.ffn}
    widths |= {"heads x head_dim": shape.q_width, "key/value heads x head_dim": shape.kv_width}
    odd = [f"{name} {width}" for name, width in widths.items() if width % MULTIPLE]
    return f"fp8 needs multiples of {MULTIPLE}, and it has {', '.join(odd)}" if odd else None


def _shape(folder: Path) -> DecoderShape | str:
    """The shape of the model in a folder whose weights are there, or why it is none of ours."""
    from lorikit.model.decoder_weights import unusable

    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its config.json cannot be read ({error})"
    reason = supported(values) if isinstance(values, dict) else "its config.json is no object"
    if reason:
        return reason
    shape = decoder_shape(values)
    return unusable(folder, shape) or shape


def _with_adapter(plan: Plan) -> Plan | str:
    """The plan with the modules of its adapter, or why these are not the decoder's."""
    from lorikit.model.decoder_adapter import adapted_modules

    assert plan.values is not None
    modules = adapted_modules(plan.shape, plan.values)
    return modules if isinstance(modules, str) else replace(plan, modules=modules)


def _modules(shape: DecoderShape, targets: str | list[str]) -> tuple[str, ...]:
    return tuple(lora.matching_names(shape.linear_names(), targets))


def _new_values(new: LoraSettings, targets: list[str]) -> dict[str, Any]:
    """adapter_config.json of a new adapter: what peft needs to read it, and what other readers look for."""
    return {
        "peft_type": "LORA",
        "task_type": new.task_type,
        "r": new.r,
        "lora_alpha": new.lora_alpha,
        "lora_dropout": new.lora_dropout,
        "target_modules": sorted(targets),
        "use_rslora": new.use_rslora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
