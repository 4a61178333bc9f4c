"""The real SmolLM2: a hundred greedy answers are those of transformers, token by token, in float32, and a merged adapter's
are those of the adapter beside its base."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorikit.config import LoraSettings, ModelConfig
from lorikit.hub import resolve_model
from lorikit.model import lora
from lorikit.model.engine import Request, Sampling
from lorikit.model.load import load_engine, load_tokenizer

pytestmark = pytest.mark.slow
NAME, LENGTH, NEW, TOGETHER = "smollm2-135m-instruct", 5, 5, 25
SUBJECTS = [
    "The cat",
    "A river",
    "My old friend",
    "Every morning the sun",
    "Two thousand years ago",
    "In France",
    "Water",
    "Music",
]
VERBS = "is,was never,begins to,likes,turned into,and a dog,can,looks like,has,does not,met,of,sings,"


def prompts_of(tokenizer):
    """A hundred beginnings of one length, so that transformers pads nothing."""
    texts = [f"{subject} {verb} the" for subject in SUBJECTS for verb in VERBS.split(",")]
    random.Random(0).shuffle(texts)
    return [(tokenizer(text)["input_ids"] * LENGTH)[:LENGTH] for text in texts[:100]]


@torch.no_grad()
def test_a_hundred_greedy_answers_are_transformers_own():
    base = resolve_model(NAME)
    prompts = prompts_of(load_tokenizer(base.path))
    engine = load_engine(ModelConfig(name_or_path=NAME, dtype="float32", device="cpu", engine="decoder"), base)
    decoding = engine.decoding(TOGETHER, LENGTH + NEW)
    greedy = Sampling(max_new_tokens=NEW, temperature=0.0, repetition_penalty=1.0)
    got = {decoding.add(Request(p, greedy, frozenset(), None, 2)): [] for p in prompts}
    while tokens := decoding.step():
        for token in tokens:
            got[token.prompt].append(token)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    want = []
    for first in range(0, len(prompts), TOGETHER):
        batch = torch.tensor(prompts[first : first + TOGETHER])
        out = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=NEW,
            min_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        want += out[:, LENGTH:].tolist()
    assert len(want) == 100
    for ours, theirs in zip(got.values(), want, strict=True):
        for token, other in zip(ours, theirs, strict=True):
            if token.id != other:  # which rounding may decide only where two are as good as equal
                assert token.top[0][1] - token.top[1][1] < 1e-4
                break
    equal = sum([t.id for t in ours] == theirs for ours, theirs in zip(got.values(), want, strict=True))
    assert equal >= 99


def test_a_merged_adapter_answers_as_the_one_beside_the_base(tmp_path):
    base, settings = (
        resolve_model(NAME),
        ModelConfig(name_or_path=NAME, dtype="float32", device="cpu", engine="decoder"),
    )
    made = load_engine(settings, base, new_adapter=LoraSettings(r=8))
    generator, state = torch.Generator().manual_seed(1), made.adapter_state()
    for name, value in state.items():
        if "lora_B" in name:
            value.normal_(0, 0.02, generator=generator)
    made.load_adapter_state(state)
    lora.save_adapter(tmp_path, made, base_name=NAME, base_revision=None, card="")
    del made
    prompts = prompts_of(load_tokenizer(base.path))[:8]
    greedy = Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=1.0)
    said = []
    for adapter, merge in ((None, False), (tmp_path, False), (tmp_path, True)):
        engine = load_engine(settings, base, adapter=adapter, merge=merge)
        said.append([(t.prompt, t.id) for t in engine.generate(prompts, greedy, frozenset())])
    assert said[2] == said[1] != said[0]
