"""What the decoder takes and what it leaves to the generic engine: configs, weights, adapters, settings."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.errors import ConfigError, ModelError
from lorikit.hub import Resolved
from lorikit.model import lora
from lorikit.model.decoder_config import decoder_shape, inverse_frequencies, supported
from lorikit.model.load import load_engine
from tiny_decoder import (
    FAMILIES,
    TARGETS,
    peer_loss,
    randomize_b,
    rows,
    save,
    settings,
)


def test_the_initial_adapter_is_pefts_to_the_byte(tmp_path):
    base = save(tmp_path, "qwen3")
    for targets in TARGETS:
        new = LoraSettings(r=4, target_modules=targets)
        one, other = (load_engine(settings(engine=e), base, new_adapter=new, seed=5) for e in ("decoder", "generic"))
        assert one.name == "decoder" and other.name == "generic"
        assert one.parameter_names() == other.parameter_names()
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequencies_of_rope_are_transformers_own(family):
    kind, values = FAMILIES[family]
    config = kind(
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=1,
        vocab_size=8,
        **values,
    )
    model = AutoModelForCausalLM.from_config(config)
    shape = decoder_shape(json.loads(config.to_json_string(use_diff=False)))
    assert torch.allclose(inverse_frequencies(shape.rope, 32), model.model.rotary_emb.inv_freq, rtol=1e-6)


def test_a_config_of_older_transformers_is_read_too():
    old = {"model_type": "llama", "vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 2}
    old |= {"num_attention_heads": 4, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    shape = decoder_shape(old)
    assert (shape.kv_heads, shape.head_dim, shape.rope.theta, shape.rope.kind) == (4, 16, 5e5, "linear")
    assert shape.windows == (0, 0) and shape.eps == 1e-6 and not shape.tied


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma2"}, "model_type gemma2"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic"}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "part of a head"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"head_dim": 7}, "do not fit together"),
        ({"hidden_size": "wide"}, "no usable hidden_size"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_it_does_not_compute_is_named_with_the_reason(change, said):
    config = json.loads(LlamaConfig(num_hidden_layers=1).to_json_string(use_diff=False))
    assert supported(config) is None
    assert said in supported(config | change)


def test_weights_in_several_files_are_those_of_one(tmp_path):
    one = save(tmp_path / "one", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(one.path)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    many = Resolved(tmp_path / "many", "org/many", "path", None)
    a, b = (load_engine(settings(engine="decoder"), base).token_losses(pack(rows())) for base in (one, many))
    assert torch.equal(a, b)


def test_weights_that_do_not_fit_the_config_are_left_to_the_other_engine(tmp_path):
    base = save(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"num_hidden_layers": 3}, "hold no model.layers.2"),
        ({"intermediate_size": 50}, "config.json says"),
        ({"tie_word_embeddings": True}, "weights of both"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=said):
            load_engine(settings(engine="decoder"), base)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ModelError, match="org/tiny"):
        load_engine(settings(), base)


@pytest.mark.parametrize(
    ("changes", "new", "said"),
    [
        ({"attn_implementation": "eager"}, {}, "attn_implementation"),
        ({"device_map": "auto", "device": "auto"}, {}, "device_map"),
        ({"trust_remote_code": True}, {}, "trust_remote_code"),
        ({}, {"init_lora_weights": "gaussian"}, "init_lora_weights"),
    ],
)
def test_what_the_decoder_does_not_do_goes_to_the_generic_engine_which_says_why(changes, new, said, tmp_path):
    base = save(tmp_path, "llama")
    values = {"name_or_path": "org/tiny", "device": "cpu"} | changes
    engine = load_engine(ModelConfig(**values), base, new_adapter=LoraSettings(**new))
    assert engine.name == "generic" and said in engine.choice
    with pytest.raises(ModelError, match=said):
        load_engine(ModelConfig(**values, engine="decoder"), base, new_adapter=LoraSettings(**new))
    assert load_engine(settings(engine="generic"), base).choice == ""


@pytest.mark.parametrize("targets", ["nothing_like_it", ["q_proj", "wrong_proj"], r".*\.attn\.(q|k)", "([", []])
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_exists(targets, tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings(target_modules=targets))


def test_the_saved_folder_is_pefts_own_and_comes_back(tmp_path):
    base = save(tmp_path / "base", "qwen3")
    new = LoraSettings(r=4, target_modules=["q_proj", "up_proj"], use_rslora=True)
    engine = load_engine(settings(), base, new_adapter=new)
    randomize_b(engine)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(tmp_path / "adapter", engine, base_name="org/tiny", base_revision="abc", card="")
    peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "adapter").eval()
    examples = rows()
    with torch.no_grad():
        assert torch.allclose(engine.loss_sum(pack(examples)), peer_loss(peer, examples), rtol=1e-5)
    for name in ("decoder", "generic"):
        again = load_engine(settings(engine=name), base, adapter=tmp_path / "adapter")
        assert again.parameters() == []
        assert torch.allclose(again.token_losses(pack(examples)), engine.token_losses(pack(examples)), atol=1e-5)
    further = LoraSettings(r=4, use_rslora=True, init_adapter=str(tmp_path / "adapter"))
    assert len(load_engine(settings(engine="decoder"), base, new_adapter=further).parameters()) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ".*_proj|lm_head"}, "lm_head"),
        ({"target_modules": None}, "target_modules None"),
        ({"r": None}, "no r"),
        ({"a_future_setting": 3}, "a_future_setting"),
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_not_the_decoders(change, said, tmp_path):
    base = save(tmp_path / "base", "llama")
    engine = load_engine(settings(), base, new_adapter=LoraSettings(target_modules=["q_proj"]))
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save_adapter(folder, engine, base_name="org/tiny", base_revision=None, card="")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(ModelError, match=said):
        load_engine(settings(engine="decoder"), base, adapter=folder)


def test_an_adapter_state_that_does_not_fit_is_refused_with_every_reason_at_once(tmp_path):
    engine = load_engine(settings(), save(tmp_path, "llama"), new_adapter=LoraSettings())
    state = engine.adapter_state()
    names = sorted(state)
    del state[names[0]]
    state |= {"unheard.of": torch.zeros(1), names[1]: torch.zeros(3, 3)}
    state[names[2]] = torch.full_like(state[names[2]], float("nan"))
    with pytest.raises(ModelError) as raised:
        engine.load_adapter_state(state)
    assert all(part in str(raised.value) for part in (names[0], "unheard.of", "(3, 3)", "NaN"))
