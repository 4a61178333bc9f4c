"""A LoRA training loop to read: rows, tokens, packed batches, loss, AdamW, an answer. Everything is here but the care.

    python examples/loop.py [--data.train FILE] [--train.max_steps 30]

`lorikit train` does the same steps and adds what a run needs beside them: the account of every row, held-out loss,
checkpoints that survive a power cut, logs. Any setting of docs/settings.md can be given as a flag.
"""

import random
import sys
from pathlib import Path

import torch

from lorikit import load_config
from lorikit.data.encode import Encoder
from lorikit.data.pack import num_targets, pack, split_step
from lorikit.data.read import read_rows
from lorikit.data.values import Message
from lorikit.hub import resolve_model
from lorikit.model.engine import Engine, Sampling
from lorikit.model.load import load_engine, load_tokenizer, stop_ids

PERSONA = str(Path(__file__).with_name("persona.json"))


def main() -> None:
    """The five steps."""

    # 1. Settings: the flags over these.
    config = load_config(
        flags=sys.argv[1:],
        model={"name_or_path": "smollm2-135m-instruct"},
        data={"train": PERSONA},
        train={"output_dir": "unused", "learning_rate": 1e-3, "max_steps": 30},
    )
    torch.manual_seed(config.train.seed)  # dropout
    dealer = random.Random(config.train.seed)  # noqa: S311  the order of the rows is no secret

    # 2. The model: a base that stays as it is, and small matrices A and B beside each linear layer, which are trained.
    base = resolve_model(config.model.name_or_path, config.model.revision, config.model.hub)
    engine = load_engine(config.model, base, new_adapter=config.lora, seed=config.train.seed)
    encoder = Encoder(load_tokenizer(base.path), config.data, stop_ids(base.path))
    print(f"{sum(p.numel() for p in engine.parameters()):,} numbers to train")

    # 3. The data: a row becomes token ids and labels; only the assistant's tokens have a label other than -100.
    files = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    rows = read_rows([Path(file) for file in files], config.data)
    examples = [example for row in rows.conversations for example in encoder.encode(row)]
    examples = [example for example in examples if len(example.input_ids) <= config.data.max_length]
    print(f"{rows.num_rows} rows read, {len(examples)} to train on, {len(rows.rejects)} refused")
    question = rows.conversations[0].messages[:-1]
    print(f"before: {answer(engine, encoder, question)}")

    # 4. The loop: a step takes 16 rows, packed end to end without padding into as few forwards as fit.
    optimizer = torch.optim.AdamW(engine.parameters(), lr=config.train.learning_rate, weight_decay=0.0)
    rows_per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    max_tokens = config.train.max_tokens_per_forward or 2048
    engine.train()
    for step in range(config.train.max_steps):
        chosen = dealer.sample(examples, min(rows_per_step, len(examples)))
        labelled = sum(num_targets(example) for example in chosen)
        step_loss = 0.0
        for part in split_step(chosen, max_tokens):
            # The sum over this part, divided by the labelled tokens of the whole step: however it is cut into parts,
            # the gradients add up to the same.
            loss = engine.loss_sum(pack(part)) / labelled
            loss.backward()
            step_loss += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(engine.parameters(), config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.train.learning_rate * (1 - step / config.train.max_steps)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1:3d}  loss {step_loss:.4f}  gradient {norm:.3f}  {labelled} labelled tokens")

    # 5. What it learned.
    engine.train(False)
    print(f"after: {answer(engine, encoder, question)}")


def answer(engine: Engine, encoder: Encoder, messages: tuple[Message, ...]) -> str:
    """Generation starts from the very ids that training puts before an answer."""
    sampling = Sampling(max_new_tokens=60, temperature=0.0, repetition_penalty=1.0)
    tokens = list(engine.generate([encoder.prompt_ids(messages)], sampling, encoder.stop_ids))
    return encoder.decode([token.id for token in tokens if token.finish != "stop"])


if __name__ == "__main__":
    main()
