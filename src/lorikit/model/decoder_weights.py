"""Safetensors -> the decoder's frozen weights, fused: q, k, v as the rows of one matrix, gate and up as those of another.

Each tensor is copied once, from the page cache straight into its rows on the device and in the type asked for, by a few
threads, so that neither a second copy of the weights nor a slow single reader is ever needed. Quantised weights
(model/frozen.py) take one tensor a thread more, for as long as it takes to quantise it.

    qkv (H E + 2 K E, D)    o (D, H E)    gate_up (2 F, D)    down (D, F)    embed and head (V, D)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorikit.errors import ModelError
from lorikit.model.decoder_config import DecoderShape
from lorikit.model.decoder_memory import keeps_turned
from lorikit.model.frozen import Dense, Fp8, Frozen, Place, allocator, packed
from lorikit.model.lora_fold import Update
from lorikit.model_files import INDEX

# A reader's share in elements. Smaller ones would open the file more often, larger ones leave threads without work at the end.
_SHARE = 1 << 27


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The frozen tensors of one decoder layer; None for those that its family has not."""

    norm: Tensor
    qkv: Frozen
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Frozen
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Frozen
    gate_up_bias: Tensor | None
    down: Frozen
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All frozen tensors of a decoder; `head` is `embed` where they are tied."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    packed_head: Frozen | None = None

    @property
    def output(self) -> Frozen:
        """`head` as a linear layer."""
        return self.packed_head or Dense(self.head, (len(self.head),))


def unusable(folder: Path, shape: DecoderShape) -> str | None:
    """None when the safetensors in `folder` hold every tensor in its shape, else what is not as it should be."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for path in _files(folder):
            found |= _header(path)
    except (OSError, ValueError, KeyError) as error:
        return f"its safetensors cannot be listed ({error})"
    for name, wanted in _shapes(shape).items():
        if name not in found:
            return f"its safetensors hold no {name}"
        if found[name] != wanted:
            return f"{name} is {found[name]}, config.json says {wanted}"
    if shape.tied and "lm_head.weight" in found:
        return "config.json ties its head to the embedding, but there are weights of both"
    return None


def keep_turned(weights: Weights, shape: DecoderShape, free: int) -> None:
    """Have the linear weights in fp8, before they are filled, transposed too, where `free` bytes allow it."""
    for layer in weights.layers if keeps_turned(shape, free) else ():
        for weight in (layer.qkv, layer.o, layer.gate_up, layer.down):
            if isinstance(weight, Fp8):
                weight.keep_turned()


def pack(weights: Weights, shape: DecoderShape) -> Weights:
    """The weights in the blocks for products of few rows on a CPU (`frozen.packed`); a tied head is then there twice. What
    was given holds no layer any more, and hardly more than one is ever there twice."""
    waiting, layers = list(weights.layers)[::-1], []
    weights = replace(weights, layers=())
    while waiting:
        layers.append(_packed_layer(waiting.pop()))
    # A token is looked up in a row: the table of a tied head is needed both ways.
    return replace(weights, layers=tuple(layers), packed_head=packed(weights.output) if shape.tied else None)


def fill(
    weights: Weights, folder: Path, shape: DecoderShape, device: torch.device, updates: Mapping[str, Update]
) -> None:
    """Put every tensor of the files in `folder`, for which `unusable` gave None, in its place.

    `updates`: an adapter, by names of the files, which is folded into the weights as they are read. ModelError when a file
    turns out to be damaged.
    """
    places = _places(weights, shape)
    from safetensors import SafetensorError, safe_open

    assert updates.keys() <= places.keys(), f"nowhere to fold {sorted(updates.keys() - places.keys())}"

    def read(path: Path, names: list[str]) -> None:
        with safe_open(path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                places[name].put(updates[name].fold(tensor.to(device)) if name in updates else tensor)

    shares = [(path, names) for path in _files(folder) for names in _shares(path, places)]
    try:
        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1, len(shares)))) as pool:
            for _ in pool.map(lambda share: read(*share), shares):
                pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: its weights cannot be read ({error}); download the model again") from None


def _packed_layer(layer: LayerWeights) -> LayerWeights:
    return replace(
        layer, qkv=packed(layer.qkv), o=packed(layer.o), gate_up=packed(layer.gate_up), down=packed(layer.down)
    )


def _files(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the first bytes of the file; no tensor is touched."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _shares(path: Path, places: Mapping[str, Place]) -> Iterator[list[str]]:
    """The wanted tensors of a file in groups of about `_SHARE` elements."""
    names: list[str] = []
    size = 0
    for name in _header(path):
        if name in places:
            names.append(name)
            size += math.prod(places[name].shape)
        if size >= _SHARE:
            yield names
            names, size = [], 0
    if names:
        yield names


def allocate(shape: DecoderShape, dtype: torch.dtype, device: torch.device, quantization: str = "none") -> Weights:
    """Room for the weights, the linear layers but the head quantised as asked for; what is in it before `fill` is anything."""
    frozen = allocator(quantization, dtype, device)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def optional(size: int, wanted: bool) -> Tensor | None:
        return empty(size) if wanted else None

    hidden, ffn, head_dim = shape.hidden, shape.ffn, shape.head_dim
    qkv = [shape.q_width, shape.kv_width, shape.kv_width]
    layers = [
        LayerWeights(
            norm=empty(hidden),
            qkv=frozen(qkv, hidden),
            qkv_bias=optional(sum(qkv), shape.qkv_bias),
            q_norm=optional(head_dim, shape.qk_norm),
            k_norm=optional(head_dim, shape.qk_norm),
            o=frozen([hidden], shape.q_width),
            o_bias=optional(hidden, shape.o_bias),
            mlp_norm=empty(hidden),
            gate_up=frozen([ffn, ffn], hidden),
            gate_up_bias=optional(2 * ffn, shape.mlp_bias),
            down=frozen([hidden], ffn),
            down_bias=optional(hidden, shape.mlp_bias),
        )
        for _ in range(shape.layers)
    ]
    embed = empty(shape.vocabulary, hidden)
    head = embed
    if not shape.tied:
        head = empty(shape.vocabulary, hidden)
    return Weights(embed, tuple(layers), empty(hidden), head)


def _shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """What the files must hold, by name."""
    on_meta = allocate(shape, torch.float32, torch.device("meta"))
    return {name: place.shape for name, place in _places(on_meta, shape).items()}


def _places(weights: Weights, shape: DecoderShape) -> dict[str, Place]:
    """Where each tensor of the files belongs: rows of the fused ones, under the names of transformers."""
    places = {"model.embed_tokens.weight": Place.of(weights.embed), "model.norm.weight": Place.of(weights.norm)}
    if not shape.tied:
        places["lm_head.weight"] = Place.of(weights.head)
    qkv = [shape.q_width, shape.kv_width, shape.kv_width]
    for number, layer in enumerate(weights.layers):
        biases: Iterable[tuple[tuple[str, ...], Tensor | None, list[int]]] = (
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.qkv_bias, qkv),
            (("self_attn.o_proj",), layer.o_bias, [shape.hidden]),
            (("mlp.gate_proj", "mlp.up_proj"), layer.gate_up_bias, [shape.ffn] * 2),
            (("mlp.down_proj",), layer.down_bias, [shape.hidden]),
        )
        prefix = f"model.layers.{number}"
        for (names, bias, rows), weight in zip(biases, (layer.qkv, layer.o, layer.gate_up, layer.down), strict=True):
            places |= {f"{prefix}.{n}.weight": place for n, place in zip(names, weight.places(), strict=True)}
            if bias is not None:
                parts = torch.split(bias, rows)
                places |= {f"{prefix}.{n}.bias": Place.of(part) for n, part in zip(names, parts, strict=True)}
        norms = {
            "input_layernorm": layer.norm,
            "post_attention_layernorm": layer.mlp_norm,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
        }
        places |= {f"{prefix}.{name}.weight": Place.of(t) for name, t in norms.items() if t is not None}
    return places
