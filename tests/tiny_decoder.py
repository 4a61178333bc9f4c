"""Tiny models of every family that the decoder computes, rows for them, and transformers + peft with the same weights."""

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lorikit.config import ModelConfig
from lorikit.data.values import IGNORE, Example
from lorikit.hub import Resolved
from lorikit.model import lora, packed_attention

LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": (LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama stretched": (LlamaConfig, {"rope_parameters": LINEAR, "rms_norm_eps": 0.01}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "mistral without a window": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 with windows above": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
    "qwen3 with biases": (Qwen3Config, {"attention_bias": True}),
}
HEADS = [(4, 2, 8), (3, 1, 8), (4, 4, 16), (6, 3, 4), (2, 1, 24)]
TARGETS = [
    "all-linear",
    ["q_proj", "v_proj"],
    "o_proj",
    ["down_proj"],
    ["gate_proj", "k_proj"],
    r".*\.1\..*(up|o)_proj",
]
VOCABULARY = 97


def save(folder, family, seed=0, *, dtype=torch.float32, **changes):
    """A model of two or three layers with weights large enough that attention is not uniform."""
    kind, values = FAMILIES[family]
    heads, kv_heads, head_dim = HEADS[changes.pop("heads", 0)]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**sizes | values | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(4)
            else:
                p.add_(torch.randn_like(p) * 0.2 if "norm" in name else torch.randn_like(p) * 0.5)
    model.to(dtype).save_pretrained(folder)
    return Resolved(Path(folder), "org/tiny", "path", None)


def settings(**values):
    return ModelConfig(name_or_path="org/tiny", device="cpu", **values)


def rows(count=5, seed=0, longest=17, one_token=False):
    """Rows whose labels come in several stretches, as those of a conversation of several turns."""
    rng = random.Random(seed)
    examples = []
    for k in range(count):
        ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, longest))]
        labels = [i if rng.random() < 0.5 else IGNORE for i in ids[:-1]] + ids[-1:]
        labels = labels[: -rng.randint(1, 3)] + [IGNORE] * 3 if len(ids) > 6 and k % 2 else labels
        examples.append(Example(ids, labels[: len(ids)] + [IGNORE] * (len(ids) - len(labels)), f"row:{k}"))
    if one_token:
        examples.insert(1, Example([5], [5], "one"))
        examples.append(Example([7, 8, 9], [IGNORE] * 3, "none"))
    return examples


def randomize_b(engine, seed=1, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    state = engine.adapter_state()
    for name, value in state.items():
        if "lora_B" in name:
            value.normal_(0, std, generator=generator)
    engine.load_adapter_state(state)


def peer_of(base, engine, dtype=torch.float32):
    """transformers + peft with the weights of the base and the adapter of the engine."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    values = engine.adapter_config()
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    peer = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{n: values[n] for n in names}))
    own = {lora.saved_name(n): p for n, p in peer.named_parameters() if p.requires_grad}
    state = engine.adapter_state()
    assert list(own) == list(state)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(state[name])
    return peer, own


def peer_loss(peer, examples):
    total = torch.zeros(())
    for example in examples:  # a row at a time: no padding can disturb it
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        logits = peer(input_ids=ids).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + cross_entropy(logits, labels[1:], reduction="sum")
    return total


def gradients(engine, batch):
    for p in engine.parameters():
        p.grad = None
    loss = engine.loss_sum(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in zip(engine.parameter_names(), engine.parameters(), strict=True)}


def take_short_attention(monkeypatch):
    """Have the decoder call the attention that a GPU takes for short rows, in its torch reference."""
    monkeypatch.setattr(packed_attention, "is_varlen", lambda *_: True)
    monkeypatch.setattr(packed_attention, "runs_kernel", lambda *_: True)
    monkeypatch.setattr(packed_attention, "_varlen", None)
