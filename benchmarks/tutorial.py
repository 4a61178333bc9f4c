"""Time the optimizer steps of the tutorial's own recipe (transformers' Trainer + PEFT, padded batches) on a GPU.

    python benchmarks/tutorial.py --model FOLDER --rows ids.json [--batch 4 --accumulate 4] [--no-checkpointing]

With --trl it is TRL's SFTTrainer with Liger's kernels instead (packages trl, liger-kernel, datasets). LoRA r 8 on all seven
linears, dropout 0.1, the same rows as benchmarks/train.py, whose line it prints. Fails when the loss is not finite or the
gradient is zero.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 2
PACKAGES, TRL_PACKAGES = ("torch", "transformers", "peft"), ("trl", "liger-kernel")


class Clock(TrainerCallback):
    """When each optimizer step ended, and what the Trainer logged last."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.log: dict[str, float] = {}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """After each step, with logging_steps 1."""
        self.log |= logs


def main() -> None:
    arguments = parse()
    rows = json.loads(arguments.rows.read_text())
    random.Random(0).shuffle(rows)
    data = [{"input_ids": ids, "labels": [-100] * cut + ids[cut:]} for ids, cut in rows]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, device_map="cuda")
    if arguments.checkpointing:
        model.enable_input_require_grads()
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, r=8, lora_alpha=32, lora_dropout=0.1)
    )
    clock, rows_per_step = Clock(), arguments.batch * arguments.accumulate
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder, "per_device_train_batch_size": arguments.batch, "learning_rate": 1e-4, "report_to": [],
            "gradient_accumulation_steps": arguments.accumulate, "max_steps": arguments.steps + WARM_UP, "logging_steps": 1,
            "gradient_checkpointing": arguments.checkpointing, "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        make = trl_trainer if arguments.trl else trainer
        make(model, data, settings, clock).train()
    seconds = [end - begin for begin, end in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)]
    assert math.isfinite(clock.log["loss"]), "the loss is not finite"
    assert float(clock.log["grad_norm"]) > 0, "there is no gradient: the figure would be worthless"
    result = {
        "who": "TRL's SFTTrainer + Liger + PEFT" if arguments.trl else "the tutorial: transformers' Trainer + PEFT",
        "job": "tutorial",
        "rows_per_step": rows_per_step,
        "batch": f"{arguments.batch} x {arguments.accumulate}",
        "checkpointing": arguments.checkpointing,
        "dropout": 0.1,
        "ms_per_step": round(median(seconds) * 1000, 1),
        "mean_ms_per_step": round(sum(seconds) / len(seconds) * 1000, 1),
        "steps": len(seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(clock.log["loss"], 4),
        "grad_norm": round(float(clock.log["grad_norm"]), 4),
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in PACKAGES + (TRL_PACKAGES if arguments.trl else ())},
        "command": shlex.join(sys.argv),
        "commit": arguments.commit,
        "python": platform.python_version(),
    }
    print(json.dumps(result))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--trl", action="store_true", help="TRL's SFTTrainer in place of transformers' Trainer")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="also append the line to this file")
    parser.add_argument("--commit", help="of the code, for the line")
    return parser.parse_args()


def trainer(model: Any, data: list[dict[str, list[int]]], settings: dict[str, Any], clock: Clock) -> Trainer:
    """As the tutorial makes it."""
    arguments = TrainingArguments(**settings)
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=padded, callbacks=[clock])


def trl_trainer(model: Any, data: list[dict[str, list[int]]], settings: dict[str, Any], clock: Clock) -> Any:
    """TRL's, on rows that are tokens already."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model.base_model.model.config._name_or_path)
    tokenizer.pad_token = "<|end_of_text|>"
    arguments = SFTConfig(
        use_liger_kernel=True, bf16=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **settings
    )  # fmt: skip
    rows = Dataset.from_list(data)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[clock])


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of one length, as the tutorial's collator makes them."""
    width = max(len(row["input_ids"]) for row in batch)

    def filled(values: list[int], value: int) -> list[int]:
        return values + [value] * (width - len(values))

    return {
        "input_ids": torch.tensor([filled(row["input_ids"], 128001) for row in batch]),
        "labels": torch.tensor([filled(row["labels"], -100) for row in batch]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in batch]),
    }


if __name__ == "__main__":
    main()
