"""The decoder with the real SmolLM2: loss, gradients and greedy answers are those of transformers + peft."""

import pytest
import torch

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.hub import resolve_model
from lorikit.model.engine import Sampling
from lorikit.model.load import load_engine, load_tokenizer, stop_ids

pytestmark = pytest.mark.slow
NAME = "smollm2-135m-instruct"
TALKS = [
    [("user", "Who are you?"), ("assistant", "A parrot, and glad to be asked.")],
    [("user", "Say it in one word: is rain wet?"), ("assistant", "Yes.")],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "Two colours, please."), ("assistant", "Red, and then blue.")],
]


def engine_of(name, base):
    config = ModelConfig(name_or_path=NAME, dtype="float32", device="cpu", engine=name)
    return load_engine(config, base, new_adapter=LoraSettings(lora_dropout=0.0), seed=7)


def test_loss_gradients_and_answers_are_those_of_transformers_and_peft():
    base = resolve_model(NAME)
    tokenizer = load_tokenizer(base.path)
    turns = [[{"role": role, "content": text} for role, text in talk] for talk in TALKS]
    ids = [tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False) for talk in turns]
    batch = pack([Example(row, [IGNORE] * 20 + row[20:], f"row:{k}") for k, row in enumerate(ids)])
    ours, theirs = engine_of("decoder", base), engine_of("generic", base)
    state = ours.adapter_state()
    generator = torch.Generator().manual_seed(1)
    for name, value in state.items():
        if "lora_B" in name:
            value.normal_(0, 0.02, generator=generator)
    losses = []
    theirs.model.double()  # in float32 its own rounding would reach the bound: its head's gradient is the less exact one
    for engine in (ours, theirs):
        engine.load_adapter_state(state)
        engine.train()
        loss = engine.loss_sum(batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, a, b in zip(ours.parameter_names(), ours.parameters(), theirs.parameters(), strict=True):
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < 1e-4, name
    theirs.model.float()
    prompts = [tokenizer.apply_chat_template(t[:-1], add_generation_prompt=True, return_dict=False) for t in turns]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    answers = [sorted_answers(engine.generate(prompts, greedy, stop_ids(base.path))) for engine in (ours, theirs)]
    assert answers[0] == answers[1]


def sorted_answers(tokens):
    """The tokens of each prompt in their order, whatever the order of the prompts."""
    answers = {}
    for token in tokens:
        answers.setdefault(token.prompt, []).append((token.id, token.finish))
    return answers
