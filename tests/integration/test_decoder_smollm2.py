"""The decoder with the real SmolLM2: loss, gradients and greedy answers are those of transformers + peft."""

import pytest
import torch

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.hub import resolve_model
from lorikit.model.engine import Sampling
from lorikit.model.load import load_engine, load_tokenizer, stop_ids
from tiny_decoder import gradients, peer_loss, peer_of, randomize_b

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
    examples = [Example(row, [IGNORE] * 20 + row[20:], f"row:{k}") for k, row in enumerate(ids)]
    ours, generic = engine_of("decoder", base), engine_of("generic", base)
    randomize_b(ours, std=0.02)
    generic.load_adapter_state(ours.adapter_state())
    loss, got = gradients(ours, pack(examples))
    # In float64: torch's float32 softmax over 49,152 words is itself off by up to 1e-4 of a gradient.
    peer, want = peer_of(base, ours, torch.float64)
    exact = peer_loss(peer, examples)
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for name, parameter in want.items():
        assert float((got[name] - parameter.grad).norm() / parameter.grad.norm()) < 5e-5, name
    prompts = [tokenizer.apply_chat_template(t[:-1], add_generation_prompt=True, return_dict=False) for t in turns]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    answers = [sorted_answers(engine.generate(prompts, greedy, stop_ids(base.path))) for engine in (ours, generic)]
    assert answers[0] == answers[1]


def sorted_answers(tokens):
    """The tokens of each prompt in their order, whatever the order of the prompts."""
    answers = {}
    for token in tokens:
        answers.setdefault(token.prompt, []).append((token.id, token.finish))
    return answers
