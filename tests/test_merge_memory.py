"""--merge: an adapter folded into its base in memory answers as the adapter beside the base does."""

import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from lorikit.config import LoraSettings
from lorikit.data.values import Message
from lorikit.errors import ConfigError, ModelError
from lorikit.infer.chat import chat
from lorikit.infer.generate import answer
from lorikit.infer.session import open_run
from lorikit.model import lora
from lorikit.model.engine import Sampling
from lorikit.model.load import load_engine
from lorikit.serve.models import open_models
from lorikit.serve.run import Options, check_options
from serving import chat as question
from serving import serving
from tiny_decoder import FAMILIES, randomize_b, rows, save, settings
from tiny_model import save_adapter, save_model, save_run

GREEDY = Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = save_model(folder / "base")
    save_run(folder / "run", base)
    save_adapter(folder / "other", base, strength=0.3)
    return folder


def text(session):
    return answer(session, [[Message("user", "hello")]], GREEDY)[0].text


def adapter_of(base, folder, **values):
    """A PEFT adapter on every linear layer of a tiny base."""
    engine = load_engine(settings(engine="decoder"), base, new_adapter=LoraSettings(r=4, **values))
    randomize_b(engine)
    folder.mkdir()
    lora.save_adapter(folder, engine, base_name=base.name, base_revision=None, card="")
    return folder


def tokens(engine):
    found = {}
    for token in engine.generate([e.input_ids for e in rows(4)], GREEDY, frozenset({2})):
        found.setdefault(token.prompt, []).append(token.id)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_gives_the_tokens_of_the_one_beside_the_base(family, tmp_path):
    base = save(tmp_path / "base", family)
    adapter = adapter_of(base, tmp_path / "adapter", use_rslora=True)
    beside, alone = load_engine(settings(), base, adapter=adapter), load_engine(settings(), base)
    want = tokens(beside)
    assert want != tokens(alone), "the test would show nothing"
    merged = [load_engine(settings(engine=name), base, adapter=adapter, merge=True) for name in ("decoder", "generic")]
    assert [engine.name for engine in merged] == ["decoder", "generic"]
    for engine in merged:
        assert engine.adapter_names() == [] and engine.parameters() == []
        assert tokens(engine) == want


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once_and_all_others_are_the_bases_own(stored, tmp_path):
    base = save(tmp_path / "base", "llama", dtype=stored)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    files, state = load_file(base.path / "model.safetensors"), load_file(adapter / lora.WEIGHTS)
    values = json.loads((adapter / lora.CONFIG).read_text())

    def want(name, base_of):
        a, b = (state[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
        whole = base_of(files[f"{name}.weight"]).float().add(b @ a, alpha=values["lora_alpha"] / values["r"])
        return whole.to(torch.bfloat16)

    chosen = settings(engine="decoder", dtype="bfloat16")
    layer = load_engine(chosen, base, adapter=adapter, merge=True).weights.layers[1]
    q, kv = layer.qkv.dense().split([32, 32])
    assert torch.equal(q, want("model.layers.1.self_attn.q_proj", lambda w: w))
    assert torch.equal(layer.down.dense(), want("model.layers.1.mlp.down_proj", lambda w: w))
    own = [files[f"model.layers.1.self_attn.{n}_proj.weight"].to(torch.bfloat16) for n in "kv"]
    assert torch.equal(kv, torch.cat(own))
    chosen = settings(engine="generic", dtype="bfloat16")
    model = load_engine(chosen, base, adapter=adapter, merge=True).model.model
    # transformers has made it bfloat16 before: that is the base it computes with.
    expected = want("model.layers.1.self_attn.q_proj", lambda w: w.to(torch.bfloat16))
    assert torch.equal(model.layers[1].self_attn.q_proj.weight, expected)


def test_the_files_of_the_base_stay_as_they_are(made):
    before = (made / "base" / "model.safetensors").read_bytes()
    open_run(made / "run", device="cpu", merge=True)
    assert (made / "base" / "model.safetensors").read_bytes() == before


def test_the_decoder_merges_what_it_cannot_hold_beside_the_base(tmp_path):
    base = save(tmp_path / "base", "llama")
    adapter = adapter_of(base, tmp_path / "adapter")
    values = json.loads((adapter / lora.CONFIG).read_text())
    (adapter / lora.CONFIG).write_text(json.dumps(values | {"alpha_pattern": {"q_proj": 40}}))
    beside = load_engine(settings(), base, adapter=adapter)
    merged = load_engine(settings(), base, adapter=adapter, merge=True)
    assert (beside.name, merged.name) == ("generic", "decoder")
    assert tokens(merged) == tokens(beside)


def test_a_merged_chat_answers_as_the_run_and_says_that_its_base_is_gone(made, monkeypatch, capsys):
    session = open_run(made / "run", device="cpu", merge=True)
    assert text(session) == text(open_run(made / "run", device="cpu"))
    assert session.merged and not session.has_adapter
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base\nhello"))
    chat(session, GREEDY)
    written = capsys.readouterr()
    assert "merged into the base" in written.err
    assert written.out == f"{text(session)}\n"


def test_a_merged_run_is_the_only_model_that_is_served(made):
    want = text(open_run(made / "run", device="cpu"))
    with serving(models=open_models([f"mine={made / 'run'}"], "cpu", merge=True)) as server:
        listed = server.get("/v1/models")[2]["data"]
        assert [(m["id"], m["parent"]) for m in listed] == [("mine", None)]
        status, _, got = server.ask(body=question(model="mine", temperature=0, max_tokens=8))
        assert status == 200 and got["choices"][0]["message"]["content"] == want
        assert server.ask(body=question(model="base"))[0] == 404


def test_what_cannot_be_merged_is_refused_with_the_reason(made, tmp_path, lorikit):
    with pytest.raises(ConfigError, match=r"nf4 \(model\.quantization\)"):
        load_engine(settings(quantization="nf4"), save(tmp_path / "b", "llama"), adapter=made / "other", merge=True)
    with pytest.raises(ConfigError, match=r"model\.device_map: auto"):
        load_engine(settings(device_map="auto"), save(tmp_path / "b", "llama"), adapter=made / "other", merge=True)
    with pytest.raises(ConfigError, match="--merge takes one run, and there are 2"):
        open_models([str(made / "run"), str(made / "other")], "cpu", merge=True)
    with pytest.raises(ConfigError, match="--watch and --merge"):
        check_options(Options(watch=True, merge=True), [])
    with pytest.raises(ModelError, match="use_dora"):
        dora = save_adapter(tmp_path / "dora", made / "base")
        values = json.loads((dora / lora.CONFIG).read_text())
        (dora / lora.CONFIG).write_text(json.dumps(values | {"use_dora": True}))
        open_run(dora, device="cpu", merge=True)
    code, out, err = lorikit("generate", str(made / "run"), "--prompt", "hello", "--merge", "--base")
    assert (code, out) == (2, "") and "--merge and --base" in err
