"""Tiny real models for the tests of chat and generation: a random Llama of two layers that speaks bytes, and adapters.

One token is one byte, so that every Chinese character and every emoji comes in pieces.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-3 and SmolLM2 have it, with the bytes alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _chat_tokenizer(tokenizer)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral have it: a few words, and <0xE4> for what they cannot spell."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: i for i, token in enumerate([*letters, "▁h", "ng", "好"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "h"), ("n", "g")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _chat_tokenizer(tokenizer)


def _chat_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def save_model(folder: Path, *, longest: int = 256, seed: int = 0) -> Path:
    """A folder with config, weights and tokenizer. `longest` is its max_position_embeddings."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, strength: float = 1.0) -> Path:
    """A PEFT adapter of random values for `base`, as PEFT itself saves it."""
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=strength)
    model.save_pretrained(folder)
    return folder


def save_run(folder: Path, base: Path, data: dict[str, object] | None = None) -> Path:
    """A finished run on `base`: config.yaml with these data settings, and adapter/."""
    settings = {
        "model": {"name_or_path": str(base)},
        "data": {"train": "rows.json", **(data or {})},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        "train": {"output_dir": str(folder)},
    }
    save_adapter(folder / "adapter", base)
    (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return folder
