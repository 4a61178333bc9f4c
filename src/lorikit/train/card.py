"""The adapter's model card: what it was trained from, on and with, and what came out. No path of this machine."""

from __future__ import annotations

from pathlib import Path

from lorikit.config import RunConfig
from lorikit.train.checkpoint import State


def model_card(config: RunConfig, base_name: str, state: State, num_rows: int) -> str:
    """README.md of an adapter folder after `state.step` steps: YAML front matter, then Markdown."""
    lora, steps = config.lora, config.train
    names = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    rows_per_step = steps.per_device_train_batch_size * steps.gradient_accumulation_steps
    bits = config.model.quantization
    facts = {
        "Base": base_name + (f", its linear layers in {bits} while training" if bits != "none" else ""),
        "Data": f"{', '.join(map(public_name, names))}, {num_rows} rows; {state.labelled_tokens:,} labelled tokens seen",
        "Adapter": f"LoRA, r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {targets}",
        "Steps": f"{state.step} of {rows_per_step} rows each",
        "Learning rate": f"{steps.learning_rate:g}, {steps.lr_scheduler_type}",
        "Seed": str(steps.seed),
    }
    if state.best_loss is not None:
        facts["Held-out loss"] = f"{state.best_loss:.4f} at its lowest, after step {state.best_step}"
    table = "\n".join(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in facts.items())
    return (
        f"---\nbase_model: {base_name}\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [lora, lorikit]\n---\n\n"
        f"# A LoRA adapter for {base_name}\n\nTrained with Lorikit.\n\n| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("the folder of {base_name}", dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, "this folder")\n```\n'
    )


def public_name(name: str) -> str:
    """A hub id as it is; of anything that looks like a path its last part."""
    is_path = Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return Path(name).name if is_path else name
