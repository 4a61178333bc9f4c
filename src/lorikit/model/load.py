"""A model folder -> tokenizer, stop tokens and an engine with its adapter on a device."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.config import LoraSettings, ModelConfig
from lorikit.errors import ConfigError, ModelError, OutOfMemoryError
from lorikit.model import lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorikit.hub import Resolved
    from lorikit.model.engine import Engine


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a model or adapter folder. ModelError says what is wrong with it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises nearly every class here
        raise ModelError(f"{path}: its tokenizer cannot be loaded: {_first_line(error)}{_code_hint(error)}") from error
    return tokenizer


def stop_ids(path: Path) -> frozenset[int]:
    """Ids at which the model in this folder stops, by generation_config.json and config.json."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):
            values = json.loads((path / name).read_text(encoding="utf-8"))
            eos = values.get("eos_token_id")
            found |= {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    return frozenset(found)


def load_engine(
    config: ModelConfig,
    base: Resolved,
    *,
    adapter: Path | None = None,
    new_adapter: LoraSettings | None = None,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    merge: bool = False,
) -> Engine:
    """The engine for a base model: alone, with the PEFT adapter in a folder, or with a new one to train.

    With `new_adapter` the adapter can be trained; its `init_adapter` names a folder to go on from. `engine: auto` takes
    the decoder where that computes the same, else the generic one, whose `choice` says why. With `merge` the adapter is
    folded into the base in memory (model/lora_fold.py), and the engine has none. Raises ModelError for a
    model that cannot be loaded or does not fit its adapter or engine, ConfigError for a device that is not there, and
    OutOfMemoryError when the weights do not fit.
    """
    if new_adapter is not None and new_adapter.init_adapter:
        adapter = Path(new_adapter.init_adapter)
        _check_same_settings(new_adapter, adapter, base)
    if merge:
        _check_mergeable(config)
    choice = ""
    device = pick_device(config.device)
    if config.quantization != "none":
        from lorikit.model import frozen

        frozen.check(config.quantization, pick_dtype(config.dtype, device), device)
    if config.engine != "generic":
        from lorikit.model import decoder_load

        plan = decoder_load.plan(config, base, None if merge else adapter, new_adapter, device)
        if not isinstance(plan, str):
            plan = replace(plan, merged=adapter) if merge else plan
            return decoder_load.load(
                plan,
                pick_dtype(config.dtype, device),
                device,
                seed=seed,
                checkpoint=gradient_checkpointing,
                gpu_memory_gib=config.gpu_memory_gib,
            )
        if config.engine == "decoder":
            raise ModelError(f"{base.name}: the decoder cannot take it, {plan}; set model.engine: auto or generic")
        choice = plan
    if config.quantization != "none":
        frozen.check_generic(config.quantization, device, choice or "model.engine is generic")
    if merge:
        return _load_merged(config, base, adapter, choice)
    return _load_generic(config, base, adapter, new_adapter, seed, gradient_checkpointing, choice)


def _check_mergeable(config: ModelConfig) -> None:
    """ConfigError for bases that an adapter is not folded into in memory."""
    reason = None
    if config.quantization != "none":
        reason = f"a base in {config.quantization} (model.quantization) has no weights to fold it into"
    elif config.device_map is not None:
        reason = f"a base that is spread over devices (model.device_map: {config.device_map}) is not folded into"
    if reason:
        raise ConfigError(f"--merge: {reason}; answer without it, or use lorikit merge, which takes the whole base")


def _load_merged(config: ModelConfig, base: Resolved, adapter: Path | None, choice: str) -> Engine:
    """transformers' model with the adapter folded in."""
    from lorikit.model.frozen import quiet_bitsandbytes
    from lorikit.model.generic import GenericEngine
    from lorikit.model.lora_fold import fold_into

    quiet_bitsandbytes()
    model = load_base(config, base)
    if adapter is not None:
        fold_into(model, adapter)
    return GenericEngine(model.eval(), attention=config.attn_implementation, choice=choice)


def _load_generic(
    config: ModelConfig,
    base: Resolved,
    adapter: Path | None,
    new_adapter: LoraSettings | None,
    seed: int,
    gradient_checkpointing: bool,
    choice: str,
) -> Engine:
    from lorikit.model import sharded
    from lorikit.model.frozen import quiet_bitsandbytes
    from lorikit.model.generic import GenericEngine

    quiet_bitsandbytes()
    trainable = new_adapter is not None
    model = load_base(config, base, shards=trainable)
    wrapped: Any = model
    if adapter is not None:
        wrapped = lora.load_adapter(model, adapter, trainable=trainable)
    elif new_adapter is not None:
        wrapped = lora.add_adapter(model, new_adapter, seed=seed)
    if gradient_checkpointing and trainable:
        enable_checkpoints(model)
    wrapped.eval()
    shared = sharded.is_sharded(config) and trainable
    device = pick_device(config.device)
    if shared:
        sharded.move_adapter(wrapped, device)
    return GenericEngine(
        wrapped, attention=config.attn_implementation, choice=choice, sharded_on=device if shared else None
    )


def enable_checkpoints(model: PreTrainedModel) -> None:
    """Have a model of transformers keep only the inputs of its layers for the backward."""
    # Without reentrant checkpoints the inputs need no gradient, with the code of older models they do.
    enable = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )  # its name since 5.20
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def load_base(config: ModelConfig, base: Resolved, *, shards: bool = False) -> PreTrainedModel:
    """The frozen base model in its type on its device; a base that was trained in shards is spread as transformers does it,
    unless `shards` are asked for."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    from lorikit.model import sharded

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if shards and sharded.is_sharded(config):
        return sharded.load(config, base.path, base.name, dtype, device)
    device_map = "auto" if sharded.is_sharded(config) else config.device_map
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(base.path),
            dtype=dtype,
            device_map=device_map or {"": str(device)},
            attn_implementation=config.attn_implementation,
            quantization_config=nf4 if config.quantization == "nf4" else None,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{base.name} in {str(dtype).removeprefix('torch.')} does not fit {device}: {_first_line(error)}; "
            "set model.device_map: auto, or take a smaller model"
        ) from None
    except Exception as error:  # transformers raises nearly every class here
        raise ModelError(f"{base.name}: cannot be loaded: {_first_line(error)}{_code_hint(error)}") from error
    model.requires_grad_(False)
    return model


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA GPU (of several processes each its own), else Apple's, else the CPU.

    ConfigError for one that is not there.
    """
    import torch

    if name == "auto":
        mps = torch.backends.mps.is_available()
        # Of several processes each has chosen its GPU before; asking would start CUDA where nobody did.
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        number = torch.cuda.current_device() if begun else 0
        return torch.device(f"cuda:{number}" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device is {name!r}: auto, cpu, cuda, cuda:N or mps") from None
    count = {"cuda": torch.cuda.device_count(), "cpu": 1, "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise ConfigError(f"model.device is {name!r}, but this machine has {count.get(device.type, 0)} of these")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that computes with it, float16 on an older one, float32 on a CPU."""
    import torch

    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def _check_same_settings(settings: LoraSettings, folder: Path, base: Resolved) -> None:
    """An adapter to go on from must have the rank, scale and base that the settings name."""
    values = lora.read_config(folder)
    pairs = [(k, values.get(k), getattr(settings, k)) for k in ("r", "lora_alpha", "use_rslora")]
    problems = [f"its {k} is {theirs}, lora.{k} is {ours}" for k, theirs, ours in pairs if theirs != ours]
    theirs = str(values.get("base_model_name_or_path") or "")
    if theirs and _short(theirs) != _short(base.name):
        problems.append(f"it was trained on {theirs}, model.name_or_path is {base.name}")
    if problems:
        raise ModelError(f"lora.init_adapter {folder}: {'; '.join(problems)}")


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2].casefold()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _code_hint(error: Exception) -> str:
    asks = "trust_remote_code" in str(error)
    return "; it brings its own Python code: read it, then set model.trust_remote_code: true" if asks else ""
