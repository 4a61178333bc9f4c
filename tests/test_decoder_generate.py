"""Generation with the decoder against transformers' own, token by token and in its distribution."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorikit.config import LoraSettings
from lorikit.model import decoder_generate
from lorikit.model.engine import Sampling
from lorikit.model.load import load_engine
from lorikit.model.sampling import Choice, next_tokens, probabilities
from tiny_decoder import FAMILIES, peer_of, randomize_b, rows, save, settings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_is_transformers_own_token_by_token(family, penalty, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder_generate, "SLOTS", 3)  # so that prompts wait for others to end
    base = save(tmp_path, family)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=4))
    randomize_b(engine)
    peer, _ = peer_of(base, engine)
    prompts = [e.input_ids for e in rows(7, seed=9)] + [[5]]
    stops = frozenset({2, 11, 23})
    got, finishes = {k: [] for k in range(8)}, {}
    wanted = Sampling(max_new_tokens=14, temperature=0, repetition_penalty=penalty)
    engine.train()
    for token in engine.generate(prompts, wanted, stops):
        assert token.prompt not in finishes
        got[token.prompt].append(token.id)
        if token.finish:
            finishes[token.prompt] = token.finish
    for k, prompt in enumerate(prompts):
        out = peer.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=sorted(stops),
            pad_token_id=0, repetition_penalty=penalty,
        )  # fmt: skip
        want = out[0, len(prompt) :].tolist()
        assert got[k] == want
        assert finishes[k] == ("stop" if want[-1] in stops else "length")


def test_a_seed_repeats_a_sampled_answer_and_leaves_the_callers_random_state_alone(tmp_path):
    engine = load_engine(settings(), save(tmp_path, "llama"))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()

    def answer(seed):
        sampling = Sampling(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=seed)
        return [t.id for t in engine.generate([[3, 4, 5]], sampling, frozenset())]

    assert answer(4) == answer(4) != answer(5)
    assert answer(None) != answer(None)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=1.0, top_k=0, repetition_penalty=1.0),
        Sampling(temperature=1.3, top_p=0.8, top_k=0, repetition_penalty=1.2),
        Sampling(temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.1),
        Sampling(temperature=1.0, top_p=0.01, top_k=0, repetition_penalty=2.0),
        Sampling(temperature=1.0, top_p=1.0, top_k=1000, repetition_penalty=1.0),
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_transformers(sampling):
    torch.manual_seed(0)
    logits, held = torch.randn(6, 50) * 3, torch.randint(0, 50, (6, 12))
    steps = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    want = LogitsProcessorList(steps)(held, logits.clone()).softmax(1)
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, held, True)
    choice = Choice.of([sampling] * 6, range(6), torch.device("cpu"))
    got = probabilities(logits, seen, choice)
    assert torch.allclose(got, want, atol=1e-6)
    drawn = next_tokens(logits, seen, choice)
    assert (want.gather(1, drawn[:, None]) > 0).all()
