"""The decoder's LoRA matrices: one flat float32 buffer, seen as PEFT's parameters and as the stacks that layers multiply by.

Modules that read the same input stand together, their A matrices as the rows of one:

    a (M, R, inputs)   b M times (outputs, R)   y[:, columns of m] += scale * (mask_m(x) a_m^T) b_m^T

Parameters and stacks are views of one storage (with a copy in the compute type where the base has another one), so a
step of the optimizer reaches the layers without any gathering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorikit.errors import ModelError
from lorikit.model import lora
from lorikit.model.decoder_config import LINEAR, DecoderShape, linear_name

GROUPS = (LINEAR[:3], LINEAR[3:4], LINEAR[4:6], LINEAR[6:])


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters of modules that read one input: a (M, R, inputs), M times b (outputs, R), and at which column of the
    fused output each adds its own. `streams` number the dropout masks, one a module of the whole model."""

    a: Tensor
    b: tuple[Tensor, ...]
    starts: tuple[int, ...]
    streams: tuple[int, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class LayerLoras:
    """The adapters of one layer by the product they add to, None where there is none. `q` and `kv` are `qkv` apart."""

    qkv: Lora | None = None
    q: Lora | None = None
    kv: Lora | None = None
    o: Lora | None = None
    gate_up: Lora | None = None
    down: Lora | None = None


NO_LORAS = LayerLoras()


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a module's matrices lie in the flat buffer."""

    layer: int
    name: str
    a: int
    b: int
    outputs: int
    inputs: int


def unsupported_adapter(values: Mapping[str, Any]) -> str | None:
    """None when an adapter_config.json asks for plain LoRA and nothing else, else what it asks for."""
    if values.get("bias", "none") != "none":
        return f"its adapter has bias {values['bias']}"
    if not isinstance(values.get("r"), int) or not isinstance(values.get("lora_alpha"), int | float):
        return "its adapter has no r or lora_alpha"
    extra = [key for key, value in values.items() if key not in _PLAIN and value not in (None, False, 0, [], {}, "")]
    return f"its adapter sets {', '.join(sorted(extra))}" if extra else None


def adapted_modules(shape: DecoderShape, values: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Names of the modules that an adapter_config.json adapts, or why the decoder does not compute it."""
    reason = unsupported_adapter(values)
    if reason:
        return reason
    targets, names = values.get("target_modules"), shape.linear_names()
    if not isinstance(targets, str | list) or not targets or targets == "all-linear":
        return f"its adapter has target_modules {targets!r}"
    other = lora.matching_names(("lm_head", "model.embed_tokens"), targets)
    unknown = [] if isinstance(targets, str) else [t for t in targets if not lora.matching_names(names, [t])]
    modules = tuple(lora.matching_names(names, targets))
    if other or unknown or not modules:
        return f"its adapter changes {', '.join(other + unknown) or 'no linear layer'}"
    return modules


def read_adapter(folder: Path, shape: DecoderShape, device: torch.device, dtype: torch.dtype) -> Adapter:
    """The PEFT adapter in a folder, to be used only; ModelError lists what does not fit a base of this shape."""
    values = lora.read_config(folder)
    modules = adapted_modules(shape, values)
    if isinstance(modules, str):
        raise ModelError(f"{folder}: the decoder cannot take it, {modules}; set model.engine: generic")
    adapter = Adapter(shape, modules, values, device=device, dtype=dtype, trainable=False)
    adapter.load(lora.read_weights(folder), f"{folder} does not fit the base")
    adapter.refresh()
    return adapter


_PLAIN = {
    "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip


class Adapter:
    """The LoRA matrices of the modules in `names`, all zero until `initialise` or `load`.

    `values` are those of adapter_config.json: r, lora_alpha, use_rslora and lora_dropout are read of them.
    """

    def __init__(
        self,
        shape: DecoderShape,
        names: Sequence[str],
        values: Mapping[str, Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        trainable: bool,
    ) -> None:
        self.shape, self.values = shape, dict(values)
        self.rank: int = values["r"]
        root = math.sqrt(self.rank) if values.get("use_rslora") else self.rank
        self.scale = float(values["lora_alpha"] / root)
        self.dropout = float(values.get("lora_dropout") or 0.0)
        self.slots, size = _layout(shape, set(names), self.rank)
        self.first_layer = min(slot.layer for slot in self.slots)
        self.flat = torch.zeros(size, device=device)
        self.compute = self.flat if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device)
        self.grad = torch.zeros(size if trainable else 0, device=device)
        self._parameters: dict[str, nn.Parameter] = {}
        self.by_layer: list[list[nn.Parameter]] = [[] for _ in range(shape.layers)]
        for slot in self.slots:
            for kind, view in zip("AB", _views(self.flat, slot, self.rank), strict=True):
                parameter = nn.Parameter(view, requires_grad=trainable)
                self._parameters[f"base_model.model.{linear_name(slot.layer, slot.name)}.lora_{kind}.weight"] = (
                    parameter
                )
                self.by_layer[slot.layer].append(parameter)
        self.loras = [self._layer_loras(layer) for layer in range(shape.layers)]

    def named(self) -> dict[str, nn.Parameter]:
        """The float32 parameters under PEFT's names, in PEFT's order."""
        return self._parameters

    def refresh(self) -> None:
        """Bring the copy in the compute type up to date; before each forward."""
        if self.compute is not self.flat:
            self.compute.copy_(self.flat)

    def clear_gradient(self) -> None:
        """Zero the gradient; each parameter's `.grad` is its view of one buffer laid out as `flat`."""
        if not len(self.grad):
            return
        self.grad.zero_()
        parameters = iter(self._parameters.values())
        for slot in self.slots:
            for view in _views(self.grad, slot, self.rank):
                next(parameters).grad = view

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Kaiming-uniform A and zero B, with the random numbers in the order that peft draws them."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            for slot in self.slots:
                # peft makes two nn.Linear, which draw their own initial values, and then draws A anew.
                first = nn.Linear(slot.inputs, self.rank, bias=False)
                nn.Linear(self.rank, slot.outputs, bias=False)
                nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
                a, b = _views(self.flat, slot, self.rank)
                a.copy_(first.weight)
                b.zero_()

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], where: str) -> None:
        """Put these values in; ModelError that begins with `where` lists every name and shape that does not fit."""
        problems = lora.mismatches(state, {name: p.shape for name, p in self._parameters.items()})
        if problems:
            raise ModelError(f"{where}: " + "; ".join(problems))
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])

    def _layer_loras(self, layer: int) -> LayerLoras:
        own = {slot.name: slot for slot in self.slots if slot.layer == layer}

        def stack(*names: str) -> Lora | None:
            """The adapters of the products in `names`, whose outputs stand side by side in this order."""
            sizes = [self.shape.linear(name)[0] for name in names]
            starts = dict(zip(names, accumulate(sizes, initial=0), strict=False))
            slots = [own[name] for name in names if name in own]
            if not slots:
                return None
            stacked = (len(slots), self.rank, slots[0].inputs)
            return Lora(
                a=self.compute[slots[0].a :][: math.prod(stacked)].view(stacked),
                b=tuple(_views(self.compute, slot, self.rank)[1] for slot in slots),
                starts=tuple(starts[slot.name] for slot in slots),
                streams=tuple(layer * len(LINEAR) + LINEAR.index(slot.name) for slot in slots),
                scale=self.scale,
            )

        query, *key_value = LINEAR[:3]
        return LayerLoras(
            stack(*LINEAR[:3]),
            stack(query),
            stack(*key_value),
            *(stack(*group) for group in GROUPS[1:]),
        )


def _layout(shape: DecoderShape, names: set[str], rank: int) -> tuple[list[Slot], int]:
    """A slot for each module in PEFT's order, and the size of the buffer. The A of a group stand together."""
    slots, end = [], 0
    for layer in range(shape.layers):
        for group in GROUPS:
            present = [(name, *shape.linear(name)) for name in group if linear_name(layer, name) in names]
            a = end
            b = a + sum(rank * inputs for _, _, inputs in present)
            for name, outputs, inputs in present:
                slots.append(Slot(layer, name, a, b, outputs, inputs))
                a, b = a + rank * inputs, b + rank * outputs
            end = b
    return slots, end


def _views(buffer: Tensor, slot: Slot, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, inputs) and B (outputs, R) of a slot."""
    a = buffer[slot.a :][: rank * slot.inputs].view(rank, slot.inputs)
    return a, buffer[slot.b :][: rank * slot.outputs].view(slot.outputs, rank)
