"""Write a model folder with Llama-3-8B's shapes and random bf16 weights: speed and memory do not depend on their values.

python benchmarks/make_model.py FOLDER [--layers 32]
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

LLAMA3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "bos_token_id": 128000,
    "eos_token_id": 128009, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**LLAMA3_8B, num_hidden_layers=arguments.layers), dtype=torch.bfloat16
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0.0, 0.02)
    model.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {model.num_parameters():,} parameters in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
