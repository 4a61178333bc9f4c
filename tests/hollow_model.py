"""Models without weights: config.json and a safetensors file whose header is whole and whose tensors are a hole in the disk."""

import json
import math
from pathlib import Path

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}


def save_hollow(folder, config, tokenizer):
    """A folder that passes for the model of `config` (of the Llama family) as long as nobody reads a weight."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {name: [config["vocab_size"], hidden] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = {
            "q_proj": [hidden, hidden],
            "k_proj": [kv, hidden],
            "v_proj": [kv, hidden],
            "o_proj": [hidden, hidden],
        }
        shapes |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        mlp = {"gate_proj": [ffn, hidden], "up_proj": [ffn, hidden], "down_proj": [hidden, ffn]}
        shapes |= {f"{prefix}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{prefix}.{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder
