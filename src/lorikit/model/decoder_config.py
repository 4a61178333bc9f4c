"""config.json of a model -> the shape of the decoder that computes it, or why our decoder does not.

Letters: D hidden, H heads, K key/value heads, E head dimension, F ffn, V vocabulary. Inverse frequencies of rope:

    default   f_i = theta^(-2i/E), i < E/2
    linear    f_i / factor
    llama3    f_i where a wave is short, f_i / factor where it is long, a blend of the two between
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Each name is used with its own defaults, those of transformers' configuration classes.
_KV_HEADS = {"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROPE = ("default", "linear", "llama3")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of each decoder layer, in the order of their names in the model."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base frequency and what stretches it."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Everything that config.json says of the computation. `windows` is the sliding window of each layer, 0 for none."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    eps: float
    rope: Rope
    windows: tuple[int, ...]
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @property
    def q_width(self) -> int:
        """H E, the rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K E, the rows of the key projection and of the value projection."""
        return self.kv_heads * self.head_dim

    def linear(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear layer by the last part of its name."""
        outputs = {"q_proj": self.q_width, "k_proj": self.kv_width, "v_proj": self.kv_width, "down_proj": self.hidden}
        inputs = {"o_proj": self.q_width, "down_proj": self.ffn}
        outputs |= {"o_proj": self.hidden, "gate_proj": self.ffn, "up_proj": self.ffn}
        return outputs[name], inputs.get(name, self.hidden)

    def linear_weights(self) -> int:
        """Numbers in the weights of all linear layers but the head."""
        return self.layers * sum(outputs * inputs for outputs, inputs in map(self.linear, LINEAR))

    def linear_names(self) -> list[str]:
        """Names of all linear layers but the head, as transformers calls them, in its order."""
        return [linear_name(layer, name) for layer in range(self.layers) for name in LINEAR]


def linear_name(layer: int, name: str) -> str:
    """(3, "q_proj") -> "model.layers.3.self_attn.q_proj"."""
    return f"model.layers.{layer}.{'self_attn' if name in LINEAR[:4] else 'mlp'}.{name}"


def supported(config: Mapping[str, Any]) -> str | None:
    """None when the decoder computes this config.json exactly, else the reason why it does not."""
    kind = config.get("model_type")
    if kind not in _KV_HEADS:
        return f"model_type {kind} is none of {', '.join(_KV_HEADS)}"
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int) or config[key] < 1]
    if missing:
        return f"config.json has no usable {missing[0]}"
    wanted = {"hidden_act": "silu", "attention_dropout": 0, "pretraining_tp": 1, "quantization_config": None}
    for key, value in wanted.items():
        if config.get(key, value) not in (value, None):
            return f"{key} is {config[key]}"
    return _unsupported_numbers(config) or _unsupported_rope(config)


def _unsupported_numbers(config: Mapping[str, Any]) -> str | None:
    heads, kv_heads, head_dim = _heads(config)
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        return f"hidden_size {config['hidden_size']} is no multiple of {heads} heads"
    if head_dim < 2 or head_dim % 2 or kv_heads < 1 or heads % kv_heads:
        return f"{heads} heads, {kv_heads} key/value heads and head_dim {head_dim} do not fit together"
    types = config.get("layer_types")
    if types is not None:
        if config["model_type"] not in ("qwen2", "qwen3"):
            return "layer_types is set"
        if len(types) != config["num_hidden_layers"] or set(types) - {"full_attention", "sliding_attention"}:
            return f"layer_types names {', '.join(sorted(set(map(str, types))))}"
    return None


def _unsupported_rope(config: Mapping[str, Any]) -> str | None:
    values = _rope_values(config)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _ROPE:
        return f"its rope is of type {kind}"
    if values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) not in (1, None):
        return "its rope turns only part of a head"
    needed = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}[kind]
    lacking = [key for key in needed if not isinstance(values.get(key), int | float)]
    return f"its rope of type {kind} lacks {lacking[0]}" if lacking else None


def decoder_shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape of a config.json for which `supported` gave None."""
    assert supported(config) is None
    kind, layers = config["model_type"], config["num_hidden_layers"]
    heads, kv_heads, head_dim = _heads(config)
    attention_bias = bool(config.get("attention_bias", False)) and kind in ("llama", "qwen3")
    values = _rope_values(config)
    original = values.get("original_max_position_embeddings", 8192)
    return DecoderShape(
        layers=layers,
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        eps=config.get("rms_norm_eps", 1e-6),
        rope=Rope(
            theta=float(values.get("rope_theta", config.get("rope_theta", 10000.0))),
            kind=values.get("rope_type", values.get("type", "default")),
            factor=values.get("factor", 1.0),
            low=values.get("low_freq_factor", 1.0),
            high=values.get("high_freq_factor", 4.0),
            original=original,
        ),
        windows=_windows(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or kind == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
    )


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """(E/2,) float32 radians a position, as transformers computes them."""
    import torch

    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "default":
        return frequencies
    slow = frequencies / rope.factor
    if rope.kind == "linear":
        return slow
    waves = rope.original * frequencies / (2 * math.pi)  # turns within the original context
    share = ((waves - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return share * frequencies + (1 - share) * slow


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, key/value heads, head dimension."""
    kind, heads = config["model_type"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", _KV_HEADS[kind])
    head_dim = config.get("head_dim", 128 if kind == "qwen3" else None)
    # qwen2's attention has a head_dim of its own only where config.json names one
    return heads, heads if kv_heads is None else kv_heads, head_dim or config["hidden_size"] // heads


def _rope_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """rope_parameters as transformers writes it since 5.0, or rope_scaling as before; empty for neither."""
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return values if isinstance(values, Mapping) else {"rope_type": str(values)}


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    kind, layers = config["model_type"], int(config["num_hidden_layers"])
    if kind == "mistral":
        return (int(config.get("sliding_window", 4096) or 0),) * layers
    window = int(config.get("sliding_window", 4096) or 0) if config.get("use_sliding_window") else 0
    if kind == "llama" or not window:
        return (0,) * layers
    types = config.get("layer_types")
    if types is not None:
        return tuple(window if t == "sliding_attention" else 0 for t in types)
    return tuple(window if layer >= config.get("max_window_layers", 28) else 0 for layer in range(layers))
