"""Requests that are answered side by side: nothing of an answer depends on what joins, leaves or is cancelled beside it."""

import math
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MinPLogitsWarper

from lorikit.config import LoraSettings
from lorikit.data.pack import pack
from lorikit.errors import DataError, ModelError, OutOfMemoryError
from lorikit.model import lora, sampling
from lorikit.model.decoder_adapter import Adapter
from lorikit.model.decoder_slots import Slots
from lorikit.model.decoder_stack import stack_adapters
from lorikit.model.engine import Request, Sampling
from lorikit.model.frozen import Packed
from lorikit.model.load import load_engine
from lorikit.model.sampling import Choice, next_tokens, probabilities, uniform
from tiny_decoder import randomize_b, rows, save, settings

GREEDY = Sampling(max_new_tokens=8, temperature=0.0, repetition_penalty=1.0)
DRAWN = Sampling(max_new_tokens=8, temperature=1.2, top_p=0.95, repetition_penalty=1.2, seed=5)
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
ENGINES = ["decoder", "generic"]


def save_adapters(folder, base):
    """Two adapters on other modules, of other ranks."""
    found = []
    for number, (rank, targets) in enumerate([(4, "all-linear"), (2, ["q_proj", "v_proj", "up_proj"])]):
        engine = load_engine(settings(engine="decoder"), base, new_adapter=LoraSettings(r=rank, target_modules=targets))
        randomize_b(engine, number)
        found.append(folder / f"adapter{number}")
        found[-1].mkdir()
        lora.save_adapter(found[-1], engine, base_name="org/tiny", base_revision=None, card="")
    return found


def load(folder, kind, family="llama"):
    base = save(folder / "base", family)
    one, two = save_adapters(folder, base)
    engine = load_engine(settings(engine=kind), base, adapter=one)
    engine.add_adapter("two", two)
    return engine


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    return load(tmp_path_factory.mktemp("engine"), request.param)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return load(tmp_path_factory.mktemp("decoder"), "decoder")


def run(engine, requests, slots=3, longest=64):
    decoding = engine.decoding(slots, longest)
    numbers = [decoding.add(r) for r in requests]
    found = {n: [] for n in numbers}
    while tokens := decoding.step():
        assert len({t.prompt for t in tokens}) == len(tokens) <= decoding.num_slots
        for token in tokens:
            found[token.prompt].append(token)
    assert (decoding.num_active, decoding.num_waiting) == (0, 0)
    decoding.close()
    return [found[n] for n in numbers]


def ids(tokens):
    return [t.id for t in tokens]


def requests(count=7, top=None):
    return [
        Request(e.input_ids, DRAWN if k % 3 == 2 else GREEDY, frozenset({2}), [None, "default", "two"][k % 3], top)
        for k, e in enumerate(rows(count, seed=3))
    ]


def test_several_adapters_in_one_batch_give_what_each_gives_alone(engine):
    mixed = [Request([3, 4, 5, k], GREEDY, frozenset(), name) for k in (6, 7) for name in (None, "default", "two")]
    together = list(map(ids, run(engine, mixed, slots=6)))
    assert together == [ids(run(engine, [r])[0]) for r in mixed]
    assert len({tuple(t) for t in together}) > 3, "the adapters must matter"
    assert engine.adapter_names() == ["default", "two"]


def test_both_engines_give_the_same_tokens_and_logprobs(tmp_path):
    wanted = [Request([5, 9, 11], GREEDY, frozenset({2}), name, 3) for name in (None, "default", "two")]
    ours, theirs = (run(load(tmp_path / kind, kind), wanted) for kind in ENGINES if not (tmp_path / kind).mkdir())
    for a, b in zip(ours, theirs, strict=True):
        assert [(t.id, t.finish) for t in a] == [(t.id, t.finish) for t in b]
        for left, right in zip(a, b, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
            assert [i for i, _ in left.top] == [i for i, _ in right.top]
            assert left.top[0] == (left.id, left.logprob)  # greedy takes the likeliest


def test_logprobs_are_the_losses_of_the_tokens(decoder):
    (tokens,) = run(decoder, [Request([5, 9, 11, 12], DRAWN, frozenset(), "default", 0)])
    example = rows(1)[0].__class__([5, 9, 11, 12, *ids(tokens)], [-100] * 4 + ids(tokens), "x")
    losses = decoder.token_losses(pack([example])).tolist()
    assert [t.logprob for t in tokens] == pytest.approx([-loss for loss in losses], abs=1e-4)
    assert all(t.top == () for t in tokens)


def test_an_answer_with_a_seed_does_not_depend_on_its_neighbours(decoder):
    alone = [ids(run(decoder, [r])[0]) for r in requests()]
    for slots in (1, 2, 7):
        assert list(map(ids, run(decoder, requests(), slots))) == alone
    assert list(map(ids, run(decoder, requests()[::-1], 4)))[::-1] == alone


def test_a_new_adapter_of_the_same_name_takes_its_place(decoder, tmp_path):
    base = save(tmp_path / "base", "llama")
    _, two = save_adapters(tmp_path, base)
    before = ids(run(decoder, [Request([3, 4], GREEDY, frozenset(), "default")])[0])
    decoder.add_adapter("other", two)
    other = ids(run(decoder, [Request([3, 4], GREEDY, frozenset(), "other")])[0])
    assert other == ids(run(decoder, [Request([3, 4], GREEDY, frozenset(), "two")])[0])
    assert before == ids(run(decoder, [Request([3, 4], GREEDY, frozenset(), "default")])[0])


def test_an_adapter_that_was_replaced_is_let_go_of(tmp_path):
    engine = load(tmp_path, "decoder")
    decoding = engine.decoding(2, 30)
    for name in ("adapter0", "adapter1", "adapter0"):
        engine.add_adapter("two", tmp_path / name)
        decoding.add(Request([3, 4], GREEDY, frozenset(), "two"))
        while decoding.step():
            pass
    assert len(decoding._on_host) == 1


@pytest.mark.parametrize("kind", ENGINES)
def test_an_answer_on_its_way_is_not_changed_by_an_adapter_that_another_thread_adds(kind, tmp_path):
    engine, name = (
        load(tmp_path, kind),
        "two" if kind == "generic" else "three",
    )  # the decoder takes one in the next step
    request = Request([3, 4], GREEDY, frozenset(), "two")
    want = ids(run(engine, [request])[0])
    decoding = engine.decoding(1, 64)
    decoding.add(request)
    tokens = decoding.step()
    other = threading.Thread(target=engine.add_adapter, args=(name, tmp_path / "adapter0"))
    other.start()
    while more := decoding.step():
        tokens += more
    other.join(timeout=20)
    assert not other.is_alive()
    assert ids(tokens) == want
    added, first = (ids(run(engine, [replace(request, adapter=one)])[0]) for one in (name, "default"))
    assert added == first


@pytest.fixture(scope="module")
def answers_alone(decoder):
    return [ids(run(decoder, [r])[0]) for r in requests(5)]


@hypothesis_settings(max_examples=25)
@given(schedule=st.lists(st.sampled_from(["add", "add", "step", "step", "cancel"]), max_size=30), data=st.data())
def test_no_schedule_of_requests_changes_an_answer_or_loses_a_slot(decoder, answers_alone, schedule, data):
    kinds, want = requests(5), answers_alone
    decoding = decoder.decoding(2, 64)
    kind_of, got, finished, cancelled = {}, {}, set(), set()

    def note(tokens):
        for t in tokens:
            assert t.prompt not in finished | cancelled
            got[t.prompt].append(t.id)
            finished.update({t.prompt} if t.finish else ())

    for action in [*schedule, "finish"]:
        if action == "add":
            kind = data.draw(st.integers(0, len(kinds) - 1))
            number = decoding.add(kinds[kind])
            kind_of[number], got[number] = kind, []
        elif action == "cancel" and kind_of:
            number = data.draw(st.sampled_from(sorted(kind_of)))
            decoding.cancel(number)
            cancelled |= {number} - finished
        elif action == "step":
            note(decoding.step())
        else:
            while tokens := decoding.step():
                note(tokens)
        assert decoding.num_active <= 2
        assert decoding.num_active + decoding.num_waiting == len(kind_of) - len(finished) - len(cancelled)
    for number, kind in kind_of.items():
        answer = got[number]
        assert answer == want[kind][: len(answer)]
        assert number in cancelled or answer == want[kind]
    decoding.close()


def test_what_cannot_be_answered_is_refused_when_it_is_added(engine):
    decoding = engine.decoding(2, 16)
    for prompt, adapter, error, text in (
        ([1, 2], "nobody", ModelError, "no adapter 'nobody' is loaded; there are default, two"),
        ([], None, DataError, "0 tokens: 1 to 15"),
        ([3] * 16, None, DataError, "16 tokens: 1 to 15"),
    ):
        with pytest.raises(error, match=text):
            decoding.add(Request(prompt, GREEDY, frozenset(), adapter))
    decoding.add(Request([3] * 12, GREEDY, frozenset()))
    tokens = [t for _ in range(4) for t in decoding.step()]
    assert [t.finish for t in tokens] == [None] * 3 + ["length"]
    decoding.close()


def test_slots_that_do_not_fit_are_an_error_with_their_size(decoder):
    with pytest.raises(OutOfMemoryError, match=r"keys and values of 9999 answers .* GiB each.*take fewer at a time"):
        Slots.allocate(decoder.shape, 9999, 10**9, torch.float32, torch.device("cpu"))


def test_an_adapter_of_another_base_is_refused(engine, tmp_path):
    base = save(tmp_path / "base", "llama", hidden_size=48)
    one, _ = save_adapters(tmp_path, base)
    with pytest.raises(ModelError, match=r"does not fit the base.*other shapes"):
        engine.add_adapter("strange", one)
    assert engine.adapter_names() == ["default", "two"]
    assert run(engine, [Request([3, 4], GREEDY, frozenset(), "two")])


def test_generation_beside_training_leaves_the_adapter_trainable(tmp_path):
    base = save(tmp_path / "base", "llama")
    _, two = save_adapters(tmp_path, base)
    for kind in ENGINES:
        engine = load_engine(settings(engine=kind), base, new_adapter=LoraSettings(r=4))
        names = engine.parameter_names()
        engine.add_adapter("two", two)
        run(engine, [Request([3, 4], GREEDY, frozenset(), name) for name in ("two", "default", None)])
        assert engine.parameter_names() == names
        engine.clear_gradient()
        engine.add_gradient(pack(rows(3)))
        assert any(float(p.grad.abs().sum()) > 0 for p in engine.parameters())


def test_tokens_are_drawn_as_often_as_they_are_likely():
    settings_ = Sampling(temperature=0.8, top_p=0.9, top_k=9, min_p=0.02, repetition_penalty=1.3)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).expand(20000, -1) * 2
    seen = torch.zeros(20000, 12, dtype=torch.bool)
    seen[:, 3] = True
    choice = Choice.of([settings_] * 20000, range(20000), torch.device("cpu"))
    want = probabilities(logits[:1], seen[:1], Choice.of([settings_], [0], torch.device("cpu")))[0].double()
    counts = torch.bincount(next_tokens(logits, seen, choice), minlength=12).double()
    assert 1 < int((want > 0).sum()) < 12
    assert bool((counts[want == 0] == 0).all())
    kept = want > 0
    square = float(((counts[kept] - 20000 * want[kept]) ** 2 / (20000 * want[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert square < freedom + 5 * math.sqrt(2 * freedom), square  # one in a million runs or so is further off


def test_the_numbers_of_neighbouring_seeds_and_places_are_spread_evenly():
    seeds = torch.arange(200).repeat_interleave(200)
    u = uniform(seeds, torch.arange(200).repeat(200))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.bincount((u * 64).long(), minlength=64).double()
    assert float(((counts - 625) ** 2 / 625).sum()) < 63 + 5 * math.sqrt(126)
    pairs = u.view(200, 200)
    for lag in (1, 2):
        for a, b in ((pairs[lag:], pairs[:-lag]), (pairs[:, lag:], pairs[:, :-lag])):
            assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.03


def test_min_p_is_transformers_own():
    logits = torch.randn(4, 40) * 3
    want = MinPLogitsWarper(0.1)(None, logits.clone()).softmax(1)
    choice = Choice.of([Sampling(temperature=1, top_p=1, repetition_penalty=1, min_p=0.1)] * 4, [0] * 4, logits.device)
    assert torch.allclose(probabilities(logits, None, choice), want, atol=1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_likeliest_candidates_are_enough_or_all_are_sorted(spread, monkeypatch):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * spread
    kinds = [Sampling(temperature=t, top_p=p, top_k=k) for t, p, k in [(0.5, 0.9, 0), (1, 0.5, 3), (1, 1, 0)]]
    choice = Choice.of([*kinds, kinds[0], Sampling(temperature=0)], [0] * 5, logits.device)
    seen = torch.zeros(5, 300, dtype=torch.bool)
    want = probabilities(logits, seen, choice)
    monkeypatch.setattr(sampling, "_CANDIDATES", 20)
    assert torch.allclose(probabilities(logits, seen, choice)[:4], want[:4], atol=1e-6)


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_packed_weights_are_the_same_weights(dtype, tied, tmp_path):
    base = save(tmp_path, "llama with biases", tie_word_embeddings=tied)
    engine = load_engine(settings(engine="decoder", dtype=dtype), base)
    theirs = AutoModelForCausalLM.from_pretrained(base.path, dtype=getattr(torch, dtype))
    attention, mlp = theirs.model.layers[1].self_attn, theirs.model.layers[1].mlp
    got = engine.weights.layers[1]
    assert isinstance(got.qkv, Packed) and isinstance(got.down, Packed), "the test would show nothing"
    assert isinstance(engine.weights.output, Packed) == tied
    assert torch.equal(got.gate_up.dense(), torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    assert torch.equal(got.down.dense(), mlp.down_proj.weight)
    assert torch.equal(engine.weights.head, theirs.lm_head.weight)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).to(theirs.dtype)
    bound = 8 * torch.finfo(theirs.dtype).eps
    keys = got.qkv[32:].forward(x, got.qkv_bias[32:])  # of 4 heads of 8, then keys and values
    want = torch.cat([attention.k_proj(x), attention.v_proj(x)], 1)
    assert (keys - want).abs().max() <= bound * want.abs().max()
    want = theirs.lm_head(x)
    assert (engine.weights.output.forward(x) - want).abs().max() <= bound * want.abs().max()
    grad = got.down.input_gradient(x)
    assert (grad - x @ mlp.down_proj.weight).abs().max() <= bound * grad.abs().max()


def test_many_requests_wait_for_few_slots_in_their_order(decoder):
    rng = random.Random(0)
    many = [Request([rng.randrange(3, 90)], GREEDY, frozenset(), "two") for _ in range(12)]
    decoding = decoder.decoding(2, 32)
    numbers, ended = [decoding.add(r) for r in many], []
    assert (decoding.num_active, decoding.num_waiting) == (0, 12)
    while tokens := decoding.step():
        ended += [t.prompt for t in tokens if t.finish]
    assert ended == numbers
    assert Counter(ended).most_common(1)[0][1] == 1


def test_the_stacks_of_a_gpu_hold_the_adapters_parameters_in_its_own_type(decoder):
    own = decoder.adapter
    half = Adapter(
        own.shape, own.shape.linear_names(), own.values, device=own.flat.device, dtype=torch.bfloat16, trainable=False
    )
    half.flat.copy_(own.flat)
    stack = stack_adapters(own.shape, {"default": half}).layers[0]["o"]
    a, b = (own.named()[f"base_model.model.model.layers.0.self_attn.o_proj.lora_{m}.weight"] for m in "AB")
    assert torch.equal(stack.a[1], a.bfloat16()) and torch.equal(stack.b[1], b.bfloat16())
    assert stack.b[1].any()


@pytest.mark.skipif(not INTERPRETER, reason="the next test starts it in Triton's interpreter")
@pytest.mark.parametrize("family", ["llama with biases", "qwen3"])
def test_the_step_of_a_gpu_gives_the_tokens_of_the_other(family, tmp_path):
    engine = load(tmp_path, "decoder", family)
    short = [replace(r, sampling=replace(r.sampling, max_new_tokens=3)) for r in requests(3)]
    for wanted in (short, short[1:2]):
        assert list(map(ids, run_as_gpu(engine, wanted))) == list(map(ids, run(engine, wanted, 4)))


def run_as_gpu(engine, wanted):
    """With kernels and stacked adapters, batches filled up with rows that belong to nobody."""
    decoding = engine.decoding(4, 64)
    decoding._kernels, decoding._graphs = True, Padded(decoding)
    numbers = [decoding.add(r) for r in wanted]
    found = {n: [] for n in numbers}
    while tokens := decoding.step():
        for token in tokens:
            found[token.prompt].append(token)
    return [found[n] for n in numbers]


class Padded:
    """DecodeGraphs without graphs."""

    def __init__(self, decoding):
        self.decoding = decoding

    def run(self, slots, modes, adapted):
        size = 1 << (len(slots) - 1).bit_length()
        filled = torch.tensor(slots + [self.decoding.num_slots] * (size - len(slots)))
        logits, chosen = self.decoding._compute(filled, modes, adapted)
        return logits[: len(slots)], chosen[: len(slots)]

    def forget(self):
        pass


@pytest.mark.skipif(INTERPRETER, reason="this one starts it")
def test_the_interpreter_decodes_the_same():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n0",
        str(Path(__file__)),
        "-k",
        "step_of_a_gpu",
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 passed" in done.stdout
