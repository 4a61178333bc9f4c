"""The decoder against transformers + peft themselves, on tiny models with random weights that transformers saved."""

import random
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from lorikit.config import LoraSettings
from lorikit.data.pack import pack
from lorikit.data.values import IGNORE, Example
from lorikit.model import decoder_layer, decoder_loss
from lorikit.model.decoder_batch import lay_out
from lorikit.model.decoder_memory import Keep
from lorikit.model.kernels.dropout import dropout_mask
from lorikit.model.load import load_engine
from tiny_decoder import (
    FAMILIES,
    HEADS,
    TARGETS,
    VOCABULARY,
    gradients,
    peer_loss,
    peer_of,
    randomize_b,
    rows,
    save,
    settings,
    take_short_attention,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draw", range(3))
def test_loss_and_every_gradient_are_those_of_transformers_and_peft(family, draw, tmp_path):
    rng = random.Random(f"{family} {draw}")
    base = save(tmp_path, family, seed=draw, heads=rng.randrange(len(HEADS)), num_hidden_layers=rng.choice([1, 2, 3]))
    targets = TARGETS[0] if draw == 0 else rng.choice(TARGETS[1:-1])
    chosen = LoraSettings(
        r=rng.choice([1, 3, 8, 64]), lora_dropout=0.0, target_modules=targets, use_rslora=rng.random() < 0.5
    )
    engine = load_engine(settings(), base, new_adapter=chosen, seed=3)
    assert engine.name == "decoder"
    randomize_b(engine)
    engine.train()
    examples = rows(seed=draw, one_token=True)
    loss, ours = gradients(engine, pack(examples))
    peer, theirs = peer_of(base, engine)
    total = peer_loss(peer, examples)
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-5)
    for name, p in theirs.items():
        scale = p.grad.abs().max()
        assert (ours[name] - p.grad).abs().max() <= 1e-4 * scale + 1e-6, name


def test_adapters_on_some_layers_only_leave_those_below_without_a_graph(tmp_path):
    base = save(tmp_path, "llama", num_hidden_layers=4)
    pattern = r".*\.(2)\.(mlp\.down|self_attn\.q)_proj"
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=2, lora_dropout=0.0, target_modules=pattern))
    randomize_b(engine)
    _, ours = gradients(engine, pack(rows()))
    peer, theirs = peer_of(base, engine)
    peer_loss(peer, rows()).backward()
    assert len(ours) == 4
    for name, p in theirs.items():
        assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max())), name
    names, nodes = [], [engine.loss_sum(pack(rows())).grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert names.count("_LayerBackward") == 2, "the adapted layer and the one above it, nothing below"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3 with biases"])
def test_in_bfloat16_it_is_as_close_to_float32_as_pefts_own_bfloat16(family, tmp_path):
    base = save(tmp_path, family, dtype=torch.bfloat16, num_hidden_layers=3, hidden_size=64)
    off = {"ours": [], "theirs": []}
    for seed in range(9):
        new = LoraSettings(r=4, lora_dropout=0.0)
        exact, half = (
            load_engine(settings(dtype=d), base, new_adapter=new, seed=seed) for d in ("float32", "bfloat16")
        )
        randomize_b(exact, seed)
        half.load_adapter_state(exact.adapter_state())
        examples = rows(seed=seed)
        _, want = gradients(exact, pack(examples))
        _, ours = gradients(half, pack(examples))
        assert all(g.dtype == torch.float32 for g in ours.values())
        peer, theirs = peer_of(base, half, torch.bfloat16)
        peer_loss(peer, examples).backward()
        for who, grads in (("ours", ours), ("theirs", {n: p.grad for n, p in theirs.items()})):
            errors = [float((grads[n].float() - want[n]).norm() / want[n].norm()) for n in want]
            off[who].append(sum(errors) / len(errors))
    # Of one batch either may be the better by chance, by up to a factor of two; over several they are alike.
    typical = {who: sorted(errors)[len(errors) // 2] for who, errors in off.items()}
    assert 0 < typical["ours"] <= 1.1 * typical["theirs"], off


class _Masked(torch.nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, p, seed, stream):
        super().__init__()
        self.p, self.seed, self.stream = p, seed, stream

    def forward(self, x):
        mask = dropout_mask(self.seed, self.stream, x.shape[1:], self.p)
        return x * mask / (1 - self.p)


def test_with_dropout_the_gradients_are_those_of_peft_under_the_same_masks(tmp_path):
    base = save(tmp_path, "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=4, lora_dropout=0.3), seed=3)
    randomize_b(engine)
    engine.train()
    ids = rows(1, seed=4, longest=17)[0].input_ids * 2
    torch.manual_seed(21)
    loss, ours = gradients(engine, pack([Example(ids, ids, "all")]))
    torch.manual_seed(21)
    seed = int(torch.randint(1 << 31, ()))
    peer, theirs = peer_of(base, engine)
    modules = [m for m in peer.modules() if hasattr(m, "lora_dropout")]
    for stream, module in enumerate(modules):
        module.lora_dropout["default"] = _Masked(0.3, seed, stream)
    total = cross_entropy(peer(input_ids=torch.tensor([ids[:-1]])).logits[0], torch.tensor(ids[1:]), reduction="sum")
    total.backward()
    assert torch.allclose(loss, total, rtol=1e-5)
    for name, p in theirs.items():
        assert (ours[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name


def test_dropout_follows_torchs_seed_and_is_off_outside_of_training(tmp_path):
    base = save(tmp_path, "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=4, lora_dropout=0.3), seed=3)
    randomize_b(engine)
    batch = pack(rows())
    quiet = [engine.loss_sum(batch).item() for _ in range(2)]
    engine.train()
    noisy = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noisy.append(engine.loss_sum(batch).item())
    engine.train(False)
    assert engine.loss_sum(batch).item() == quiet[0] == quiet[1] != noisy[0]
    assert noisy[0] == noisy[1] != noisy[2]


@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["gate_proj", "k_proj"]], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "llama with biases"])
def test_how_much_the_layers_keep_changes_no_gradient(family, targets, tmp_path):
    base = save(tmp_path, family, num_hidden_layers=3)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(lora_dropout=0.25, target_modules=targets), seed=3)
    randomize_b(engine)
    engine.train()
    grads = {}
    for level in (Keep.INPUT, Keep.PRODUCTS, Keep.GATE_UP, Keep.ALL):
        engine.highest = level
        torch.manual_seed(11)
        grads[level] = gradients(engine, pack(rows()))[1]
    for level, got in grads.items():
        for name, want in grads[Keep.ALL].items():
            assert torch.equal(got[name], want) and want.abs().max() > 0, (level, name)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["up_proj", "v_proj"], ["gate_proj", "down_proj"], ["o_proj"]], ids=str
)
@pytest.mark.parametrize("family", ["qwen3", "llama with biases"])
def test_adapters_that_the_activation_adds_give_the_same_bytes(family, targets, tmp_path, monkeypatch):
    base = save(tmp_path, family, num_hidden_layers=3)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(lora_dropout=0.25, target_modules=targets), seed=3)
    randomize_b(engine)
    engine.train()

    def results(level):
        engine.highest = level
        torch.manual_seed(11)
        loss, grads = gradients(engine, pack(rows(one_token=True)))
        return [loss, *grads.values()]

    want = results(Keep.ALL)
    monkeypatch.setattr(decoder_layer, "runs_swiglu_lora", lambda *_: True)  # as on a GPU, with the reference
    for level in (Keep.INPUT, Keep.PRODUCTS, Keep.GATE_UP, Keep.ALL):
        assert all(torch.equal(got, wanted) for got, wanted in zip(results(level), want, strict=True)), level


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2 with windows above", "qwen3 with biases"])
def test_tokens_that_all_rows_begin_with_are_computed_once_and_change_nothing(family, short, tmp_path, monkeypatch):
    if short:
        take_short_attention(monkeypatch)
    base = save(tmp_path, family, num_hidden_layers=3)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(lora_dropout=0.0, target_modules="all-linear"))
    randomize_b(engine)
    system = [4, 9, 11, 5, 8, 6, 7]
    examples = [
        Example([*system, *e.input_ids], [IGNORE] * len(system) + e.labels, e.source) for e in rows(6, one_token=True)
    ]
    batch = pack(examples)
    at = lay_out(batch)
    labelled = [e for e in examples if any(label != IGNORE for label in e.labels[1:])]
    assert at.prefix >= len(system) - 1  # the last of them predicts a label in some rows
    assert len(at.tokens) <= sum(len(e.input_ids) for e in labelled) - (len(labelled) - 1) * at.prefix
    peer, own = peer_of(base, engine)
    want = peer_loss(peer, examples)
    want.backward()
    loss, got = gradients(engine, batch)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, parameter in own.items():
        assert (got[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() > 0, name
    losses = engine.token_losses(batch)
    assert losses.sum().item() == pytest.approx(want.item(), rel=1e-5)


def test_rows_with_too_little_in_common_or_with_labels_at_once_share_nothing():
    alike = [Example([1, *range(k, k + 50)], [IGNORE] * 9 + [9] * 42, "a") for k in (5, 20)]
    assert lay_out(pack(alike)).prefix == 0
    at_once = [Example([5, 6, 7, k], [5, 6, 7, k], "a") for k in range(10, 20)]
    assert lay_out(pack(at_once)).prefix == 0
    one = [Example([1, 2, 3, 4], [IGNORE, IGNORE, IGNORE, 4], "a")]
    assert lay_out(pack(one)).prefix == 0
    assert lay_out(pack(one * 5)).prefix == 2  # the third token predicts the label


def test_gradient_checkpointing_keeps_the_inputs_of_layers_alone(tmp_path):
    base = save(tmp_path, "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(), gradient_checkpointing=True)
    assert engine.levels(100) == (Keep.INPUT,) * 2
    engine = load_engine(settings(), base, new_adapter=LoraSettings())
    assert engine.levels(100) == (Keep.GATE_UP,) * 2


def test_logits_in_many_chunks_give_the_loss_of_one(tmp_path, monkeypatch):
    engine = load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings(lora_dropout=0.0))
    randomize_b(engine)
    whole, want = gradients(engine, pack(rows()))
    losses = engine.token_losses(pack(rows()))
    monkeypatch.setattr(decoder_loss, "_CHUNK_CPU", 7 * VOCABULARY)
    loss, got = gradients(engine, pack(rows()))
    assert torch.allclose(loss, whole, rtol=1e-6)
    assert all(torch.allclose(got[n], want[n], rtol=1e-4, atol=1e-6) for n in want)
    assert torch.allclose(engine.token_losses(pack(rows())), losses)
    assert torch.allclose(losses.sum(), whole)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2 with windows above"])
def test_a_row_gives_the_same_losses_whatever_stands_beside_it(family, tmp_path):
    engine = load_engine(settings(), save(tmp_path, family))
    wanted = rows(1, seed=5)[0]
    alone = engine.token_losses(pack([wanted]))
    for seed in (6, 7):
        beside = engine.token_losses(pack([*rows(3, seed=seed), wanted]))
        assert torch.allclose(beside[-len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_label_has_the_loss_zero_and_a_gradient(tmp_path):
    engine = load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings())
    batch = pack([Example([3, 4], [IGNORE, IGNORE], "none"), Example([5], [5], "one")])
    loss, grads = gradients(engine, batch)
    assert loss == 0
    assert all((g == 0).all() for g in grads.values())
    assert engine.token_losses(batch).shape == (0,)


def test_without_adapter_is_the_base(tmp_path):
    base = save(tmp_path, "llama")
    batch = pack(rows())
    before = load_engine(settings(), base).token_losses(batch)
    engine = load_engine(settings(), base, new_adapter=LoraSettings())
    randomize_b(engine)
    assert not torch.allclose(engine.token_losses(batch), before, atol=1e-3)
    with engine.without_adapter():
        assert torch.equal(engine.token_losses(batch), before)
    assert not torch.equal(engine.token_losses(batch), before)


def test_a_step_of_the_optimizer_reaches_the_layers(tmp_path):
    engine = load_engine(
        settings(dtype="bfloat16"), save(tmp_path, "llama"), new_adapter=LoraSettings(lora_dropout=0.0)
    )
    optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01, fused=True)
    losses = []
    for _ in range(6):
        loss, _ = gradients(engine, pack(rows()))
        optimizer.step()
        losses.append(float(loss))
    assert all(after < before for before, after in pairwise(losses))


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.[23]\..*(q|down)_proj", r".*layers\.2\.mlp\.up_proj"])
def test_a_rehearsal_goes_through_a_layer_of_each_kind_and_leaves_the_engine_as_it_was(targets, tmp_path):
    base = save(tmp_path, "llama", num_hidden_layers=6)
    engine = load_engine(settings(), base, new_adapter=LoraSettings(lora_dropout=0.1, target_modules=targets))
    randomize_b(engine)
    batch = pack(rows(6))
    loss, want = gradients(engine, batch)
    layers, state, seen = engine.layers, torch.get_rng_state(), []
    engine.run, run = (lambda *given: seen.extend(engine.layers) or run(*given)), engine.run
    engine.rehearse()
    del engine.run
    assert engine.layers is layers and not engine.training and torch.equal(torch.get_rng_state(), state)
    assert {tuple(p.shape for p in layer.parameters) for layer in seen} == {
        tuple(p.shape for p in layer.parameters) for layer in layers
    }
    assert layers[-1] in seen and len(seen) < len(layers)
    again, got = gradients(engine, batch)
    assert torch.equal(loss, again) and all(torch.equal(got[name], want[name]) for name in want)
