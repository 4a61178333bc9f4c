"""What a LoRA adapter adds to the stored weights of its base: W' = round(W + s B A), in float32, rounded once to W's type.

s = alpha / r, or alpha / sqrt(r) with rsLoRA. Used when an adapter is merged into files (export/fold.py) or in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.errors import ModelError
from lorikit.model import lora
from lorikit.model_files import INDEX

if TYPE_CHECKING:
    from torch import Tensor, nn

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PREFIX = "base_model.model."
_PARTS = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file; `dtype` in the words of that format, such as BF16."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to one weight: scale B A, with a (r, inputs) and b (outputs, r) float32; `transposed` for a weight
    that is stored (inputs, outputs)."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def fold(self, weight: Tensor) -> Tensor:
        """The weight with the update added, float32, a new tensor on its device."""
        product = self.b.to(weight.device) @ self.a.to(weight.device)
        return weight.float().add(product.T if self.transposed else product, alpha=self.scale)


def stored_tensors(model: Path) -> list[Stored]:
    """Every tensor of a model folder, in the order of its files. ModelError for a type that cannot be copied."""
    index = model / INDEX
    names: list[str] = []
    if (model / "model.safetensors").is_file() or not index.is_file():
        names = ["model.safetensors"] if (model / "model.safetensors").is_file() else []
        names = names or sorted(path.name for path in model.glob("*.safetensors"))
    else:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [stored for name in names for stored in _header(model / name)]
    odd = sorted({stored.dtype for stored in found if stored.dtype not in BYTES})
    if odd:
        raise ModelError(
            f"{model}: holds tensors of type {', '.join(odd)}: a quantised model; merge into the one it was made of"
        )
    return found


def read_updates(adapter: Path, tensors: Sequence[Stored]) -> dict[str, Update]:
    """What the PEFT adapter in a folder adds, by the name of the stored weight.

    ModelError lists everything that is not plain LoRA on stored float matrices.
    """
    values, state = lora.read_config(adapter), lora.read_weights(adapter)
    problems = _unfoldable(values)
    problems += [f"{name} holds NaN or infinity" for name, t in state.items() if not bool(t.isfinite().all())]
    stored = {t.name: t for t in tensors}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _PARTS.fullmatch(name)
        if match:
            parts.setdefault(match[1].removeprefix(_PREFIX), {})[match[2]] = tensor.float()
        else:
            problems.append(f"{name} is no LoRA matrix of a linear layer")
    updates = {}
    for module, pair in parts.items():
        weight = _stored_weight(module, stored)
        wrong = _misfit(module, pair, weight, transposed=bool(values.get("fan_in_fan_out")))
        if wrong or weight is None:
            problems.append(wrong or f"{module}: not among the stored weights")
            continue
        updates[weight.name] = Update(pair["A"], pair["B"], _scale(values, module), bool(values.get("fan_in_fan_out")))
    if problems or not updates:
        shown = "; ".join(problems[:5] or ["it holds no LoRA matrices"]) + (
            f"; and {len(problems) - 5} more" if problems[5:] else ""
        )
        raise ModelError(f"{adapter} cannot be merged: {shown}")
    return updates


def fold_into(model: nn.Module, adapter: Path) -> None:
    """Add the PEFT adapter in a folder to the weights of a model in memory, each rounded once; errors as `read_updates`."""
    import torch

    named = dict(model.named_parameters())
    types = {getattr(torch, name): code for code, name in FLOATS.items()}
    held = [Stored(n, adapter, types.get(p.dtype, str(p.dtype)), tuple(p.shape)) for n, p in named.items()]
    updates = read_updates(adapter, held)
    with torch.no_grad():
        for name, update in updates.items():
            named[name].copy_(update.fold(named[name]))


def _header(path: Path) -> Iterator[Stored]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries = sorted((e["data_offsets"][0], n, e) for n, e in header.items() if n != "__metadata__")
    return (Stored(name, path, entry["dtype"], tuple(entry["shape"])) for _, name, entry in entries)


def _unfoldable(values: Mapping[str, Any]) -> list[str]:
    """What an adapter_config.json asks for beyond scale B A added to weights."""
    problems = []
    if values.get("bias", "none") != "none":
        problems.append(f"it trains biases (bias: {values['bias']})")
    for key in (
        "use_dora",
        "use_qalora",
        "lora_bias",
        "modules_to_save",
        "layer_replication",
        "target_parameters",
        "alora_invocation_tokens",
        "trainable_token_indices",
    ):
        if values.get(key):
            problems.append(f"it has {key}")
    if not isinstance(values.get("r"), int) or not isinstance(values.get("lora_alpha"), int | float):
        problems.append("it has no r or lora_alpha")
    return problems


def _scale(values: Mapping[str, Any], module: str) -> float:
    """alpha / r of one module, as peft finds it: patterns are regular expressions for the end of the name."""

    def value(patterns: Any, default: float) -> float:
        for pattern, own in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(own)
        return default

    r, alpha = value(values.get("rank_pattern"), values["r"]), value(values.get("alpha_pattern"), values["lora_alpha"])
    return alpha / math.sqrt(r) if values.get("use_rslora") else alpha / r


def _stored_weight(module: str, stored: Mapping[str, Stored]) -> Stored | None:
    """The weight of a module: under its name, or under it without the model's own prefix, as older files have it."""
    name = f"{module}.weight"
    return stored.get(name) or stored.get(name.partition(".")[2])


def _misfit(module: str, pair: Mapping[str, Tensor], weight: Stored | None, *, transposed: bool) -> str | None:
    if weight is None:
        tied = " (it is tied to the input embedding)" if module.endswith("lm_head") else ""
        return f"{module}: not among the stored weights{tied}"
    if weight.dtype not in FLOATS:
        return f"{weight.name} is stored as {weight.dtype}, not as floats"
    if set(pair) != {"A", "B"}:
        return f"{module} has lora_{next(iter(pair))} alone"
    shape = (pair["B"].shape[0], pair["A"].shape[1])
    shape = shape[::-1] if transposed else shape
    if (
        pair["A"].dim() != 2
        or pair["B"].dim() != 2
        or pair["A"].shape[0] != pair["B"].shape[1]
        or shape != weight.shape
    ):
        return f"{module}: B A is {shape}, the weight {weight.shape}"
    return None
