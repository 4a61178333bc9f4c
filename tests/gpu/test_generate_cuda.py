"""Decoding on an NVIDIA GPU: CUDA graphs, kernels and stacked adapters against the same without, and against transformers."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

from lorikit.config import LoraSettings, ModelConfig  # noqa: E402
from lorikit.model import lora  # noqa: E402
from lorikit.model.engine import Request, Sampling  # noqa: E402
from lorikit.model.load import load_engine  # noqa: E402
from test_decode_kernels import ATTENTION, LORA, check_attention, check_row_lora, check_store  # noqa: E402
from test_kernels import DTYPES  # noqa: E402
from tiny_decoder import peer_of, randomize_b, rows, save  # noqa: E402

GREEDY = Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=1.0)
DRAWN = Sampling(max_new_tokens=9, temperature=1.1, top_p=0.9, repetition_penalty=1.2, seed=4)
LLAMA = (3, 32, 8, 128, 700, 4, 0)


@DTYPES
@pytest.mark.parametrize("sizes", [*ATTENTION, LLAMA])
def test_attention_over_the_cache_is_the_formula(sizes, dtype):
    check_attention(*sizes, dtype, "cuda")


@DTYPES
def test_keys_and_values_go_to_their_place(dtype):
    check_store(3, 32, 8, 64, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("sizes", [*LORA, (64, 4096, (4096, 1024, 1024), 8, 3), (1, 14336, (4096,), 64, 2)])
def test_each_row_has_its_own_adapter(sizes, dtype):
    check_row_lora(*sizes, dtype, "cuda")


@pytest.fixture(params=["llama", "mistral", "qwen3", "llama with biases"])
def engine(request, tmp_path):
    """float32, so that answers do not hang on rounding; one adapter of its own, another beside it."""
    base = save(tmp_path / "base", request.param)
    made = []
    for number, (rank, targets) in enumerate([(4, "all-linear"), (2, ["q_proj", "down_proj"])]):
        new = LoraSettings(r=rank, target_modules=targets)
        made.append(load_engine(settings(), base, new_adapter=new))
        randomize_b(made[-1], number)
    folder = tmp_path / "two"
    folder.mkdir()
    lora.save_adapter(folder, made[1], base_name="org/tiny", base_revision=None, card="")
    made[0].add_adapter("two", folder)
    made[0].base_for_peer = base
    made[0].decode_graphs = made[0].decode_kernels = True
    return made[0]


def settings(dtype="float32"):
    return ModelConfig(name_or_path="org/tiny", device="cuda", dtype=dtype, engine="decoder")


def wanted(count=9):
    return [
        Request(e.input_ids, DRAWN if k % 4 == 3 else GREEDY, frozenset({2}), [None, "default", "two"][k % 3])
        for k, e in enumerate(rows(count, seed=3))
    ]


def run(decoding, requests):
    numbers = [decoding.add(r) for r in requests]
    found = {n: [] for n in numbers}
    while tokens := decoding.step():
        for token in tokens:
            found[token.prompt].append(token.id)
    return [found[n] for n in numbers]


def test_graphs_kernels_and_neither_give_the_same_tokens(engine):
    found = {}
    for graphs, kernels in ((True, True), (False, True), (False, False)):
        engine.decode_graphs, engine.decode_kernels = graphs, kernels
        decoding = engine.decoding(5, 64)
        found[graphs, kernels] = [run(decoding, wanted()) for _ in range(2)]  # the second time all graphs are there
        assert bool(decoding._graphs and len(decoding._graphs)) is graphs
    first, second, third = found.values()
    assert first == second == third
    assert first[0] == first[1]


def test_requests_side_by_side_answer_as_alone(engine):
    alone = [run(engine.decoding(1, 64), [r])[0] for r in wanted()]
    for slots in (2, 9):
        assert run(engine.decoding(slots, 64), wanted()) == alone


def test_greedy_answers_are_transformers_and_pefts(engine):
    peer, _ = peer_of(engine.base_for_peer, engine)
    prompts = [e.input_ids for e in rows(5, seed=9)]
    got = run(engine.decoding(5, 64), [Request(p, GREEDY, frozenset(), "default") for p in prompts])
    for prompt, answer in zip(prompts, got, strict=True):
        out = peer.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert answer == out[0, len(prompt) :].tolist()


def test_a_step_that_cannot_be_captured_goes_on_without_graphs(engine):
    want = run(engine.decoding(3, 64), wanted())
    decoding = engine.decoding(3, 64)
    compute = decoding._graphs._compute

    def asks_the_host(*arguments):
        logits, chosen = compute(*arguments)
        int(chosen.sum())  # which no capture allows
        return logits, chosen

    decoding._graphs._compute = asks_the_host
    with pytest.warns(RuntimeWarning, match="goes on without CUDA graphs"):
        assert run(decoding, wanted()) == want


def test_logprobs_of_a_graph_are_those_of_transformers_and_peft(engine):
    peer, _ = peer_of(engine.base_for_peer, engine)
    prompt, decoding = [5, 9, 11], engine.decoding(2, 64)
    decoding.add(Request(prompt, GREEDY, frozenset(), "default", 2))
    tokens = [t for step in iter(decoding.step, []) for t in step]
    whole = torch.tensor([[*prompt, *(t.id for t in tokens)]])
    want = peer.eval()(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(1)
    for token, row in zip(tokens, want, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
        assert token.top[0] == (token.id, token.logprob)


def test_in_bfloat16_every_token_is_chosen_with_the_adapter(tmp_path):
    base = save(tmp_path / "base", "llama")
    engine = load_engine(settings("bfloat16"), base, new_adapter=LoraSettings(r=4, target_modules="all-linear"))
    randomize_b(engine, 0)
    peer, _ = peer_of(base, engine)
    tokens = {}
    for name in ("default", None):
        decoding = engine.decoding(1, 64)
        decoding.add(Request([5, 9, 11], GREEDY, frozenset(), name, 1))
        tokens[name] = [t for step in iter(decoding.step, []) for t in step]
    errors = {}
    for name, found in tokens.items():
        whole = torch.tensor([[5, 9, 11, *(t.id for t in found)]])
        want = peer.eval()(input_ids=whole).logits[0, 2:-1].log_softmax(1)
        errors[name] = max(abs(t.logprob - float(row[t.id])) for t, row in zip(found, want, strict=True))
    assert errors["default"] < 0.1 < errors[None]  # what the base alone says is told from it
