"""LoRA adapters in PEFT's own format: y = W x + (lora_alpha / r) B A dropout(x), made, saved, checked and loaded.

A is kaiming-uniform and B zero as in peft; the adapter's weights are float32 whatever the base is. The saved folder is
what PeftModel.from_pretrained reads: adapter_config.json, adapter_model.safetensors. No pickle is read or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.config import LoraSettings
from lorikit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from lorikit.model.engine import Engine

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def saved_name(parameter: str) -> str:
    """A parameter's name in a PeftModel -> its key in adapter_model.safetensors (without the adapter's own name)."""
    return re.sub(r"\.default(?=\.|$)", "", parameter)


def add_adapter(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """A new adapter on `model`, whose weights are frozen. The same seed gives the same A on every device.

    Raises ConfigError when a target matches no linear layer, listing those that exist.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets = check_targets(model, settings.target_modules)
    config = LoraConfig(
        task_type=settings.task_type,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        init_lora_weights=settings.init_lora_weights,
        bias="none",
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()


def check_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """`target_modules` as peft takes them; ConfigError when one of them matches no linear layer.

    A list holds names or their last parts; a single word is a list of one; any other text is one regular expression that
    must match whole names; all-linear is every linear layer but the output head.
    """
    names = linear_names(model)
    if targets == "all-linear" and names:
        last_parts = {n.rpartition(".")[2] for n in names}
        same = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in last_parts]
        return sorted(last_parts) if set(same) == set(names) else names  # short names where they mean the same
    return choose_targets(names, targets)


def choose_targets(names: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """As `check_targets`, for a model whose linear layers, but for its head, have these names and no other modules do."""
    if not names:
        raise ModelError("the model has no linear layers that LoRA could adapt")
    last_parts = sorted({n.rpartition(".")[2] for n in names})
    kinds = ", ".join(last_parts)
    if targets == "all-linear":
        return last_parts
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(f"lora.target_modules {targets!r} is no regular expression: {error}") from None
        matching = [n for n in names if pattern.fullmatch(n)]  # peft would take the activations beside them too
        if not matching:
            raise ConfigError(
                f"lora.target_modules {targets!r} matches no linear layer, as {names[0]}; there are {kinds}"
            )
        return matching
    wanted = [targets] if isinstance(targets, str) else list(targets)
    lacking = [t for t in wanted if not matching_names(names, [t])]
    if lacking or not wanted:
        shown = ", ".join(map(repr, lacking)) or "an empty list"
        raise ConfigError(f"lora.target_modules: {shown} matches no linear layer of this model; there are {kinds}")
    return wanted


def matching_names(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """Those of `names` that peft adapts: whole names or their last parts in a list, or one expression for whole names."""
    if isinstance(targets, str):
        return [n for n in names if re.fullmatch(targets, n)]
    return [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that peft's all-linear adapts: all but the output head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, *, trainable: bool, name: str = "default"
) -> PeftModel:
    """`model` with the PEFT adapter in `folder`, beside those that it has. ModelError lists everything that does not fit."""
    from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    values, state = read_config(folder), read_weights(folder)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(model, PeftModel):
        names = {n.rpartition(".")[2] for n in linear_names(base)}
        targets = values.get("target_modules")
        if isinstance(targets, list) and not any(str(t).rpartition(".")[2] in names for t in targets):
            raise ModelError(f"{folder}: adapts {', '.join(sorted(targets))}; the base has {', '.join(sorted(names))}")
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = base.name_or_path  # where it is here; peft would warn
    config.inference_mode = not trainable
    config.init_lora_weights = False
    try:
        if isinstance(model, PeftModel):
            adapted = model
            adapted.add_adapter(name, config)
        else:
            adapted = get_peft_model(base, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder}: peft cannot put this adapter on the base: {error}") from None
    wanted = {k: v.shape for k, v in get_peft_model_state_dict(adapted, adapter_name=name).items()}
    problems = mismatches(state, wanted)
    if problems:
        if adapted is model:
            adapted.delete_adapter(name)
        raise ModelError(f"{folder} does not fit the base {base.name_or_path}: " + "; ".join(problems))
    set_peft_model_state_dict(adapted, state, adapter_name=name)
    return adapted.eval()


def mismatches(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> list[str]:
    """What keeps `state` from fitting `wanted`: missing and unknown names, other shapes, values that are not finite."""
    problems = []
    for title, keys in (("missing", wanted.keys() - state.keys()), ("unknown", state.keys() - wanted.keys())):
        if keys:
            problems.append(f"{len(keys)} {title} tensors ({_first(keys)})")
    shared = sorted(wanted.keys() & state.keys())
    other = [f"{k} is {tuple(state[k].shape)}, not {tuple(wanted[k])}" for k in shared if state[k].shape != wanted[k]]
    if other:
        problems.append(f"{len(other)} other shapes ({_first(other)})")
    spoilt = [k for k in shared if not bool(state[k].isfinite().all())]
    if spoilt:
        problems.append(f"{len(spoilt)} tensors hold NaN or infinity ({_first(spoilt)})")
    return problems


def _first(items: Iterable[str]) -> str:
    items = sorted(items)
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's adapter_config.json; ModelError when it is missing, damaged or no LoRA."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {CONFIG}; give the folder of a PEFT adapter or of a run") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type is {kind!r}; only LORA adapters are supported")
    assert isinstance(values, dict)
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU; ModelError when they are missing, damaged or pickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        advice = (
            "adapter_model.bin is a pickle, which can run code; convert it to safetensors" if pickled else "not found"
        )
        raise ModelError(f"{path}: {advice}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path}: damaged or cut off ({error}); take the copy of a checkpoint or train again"
        ) from None


def save_adapter(folder: Path, engine: Engine, *, base_name: str, base_revision: str | None, card: str) -> None:
    """Write adapter_config.json, adapter_model.safetensors and README.md into an existing folder.

    The config names the base as a person would find it (`base_name`, `base_revision`), not as a path of this machine.
    OSError and SafetensorError of a failing disk are the caller's to explain.
    """
    adapter_writer(engine, base_name=base_name, base_revision=base_revision, card=card)(folder)


def adapter_writer(engine: Engine, *, base_name: str, base_revision: str | None, card: str) -> Callable[[Path], None]:
    """What `save_adapter` does, of the adapter as it is now: the result may be called after it has changed."""
    from safetensors.torch import save_file

    weights = engine.adapter_state()
    values = engine.adapter_config() | {"base_model_name_or_path": base_name, "revision": base_revision}

    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


def config_values(model: PeftModel) -> dict[str, Any]:
    """adapter_config.json of a PeftModel's adapter, as PEFT writes it for inference."""
    values = model.peft_config["default"].to_dict() | {"inference_mode": True}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
