"""From a model folder to an engine: types, devices, adapters to go on from, and folders that are not models."""

import json

import pytest
import torch

from lorikit.config import LoraSettings, ModelConfig
from lorikit.data.pack import pack
from lorikit.data.values import Example
from lorikit.errors import ConfigError, ModelError
from lorikit.hub import Resolved
from lorikit.model.load import load_engine, load_tokenizer, pick_device, pick_dtype, stop_ids
from tiny_model import save_adapter, save_model

BATCH = pack([Example([1, 2, 3, 4], [1, 2, 3, 4], "f:1"), Example([7, 8], [7, 8], "f:2")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Resolved(save_model(tmp_path_factory.mktemp("load") / "base"), "org/base", "path", None)


def settings(**values):
    return ModelConfig(name_or_path="org/base", device=values.pop("device", "cpu"), **values)


@pytest.mark.parametrize(
    ("dtype", "want"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_the_base_has_the_type_that_is_asked_for_and_the_adapter_is_float32(base, dtype, want):
    engine = load_engine(settings(dtype=dtype, engine="generic"), base, new_adapter=LoraSettings(r=2))
    assert next(engine.base.parameters()).dtype == want
    assert all(p.dtype == torch.float32 for p in engine.parameters())
    assert not any(p.requires_grad for n, p in engine.base.named_parameters() if "lora_" not in n)


def test_a_device_map_places_the_model_and_trains(base):
    engine = load_engine(settings(device="auto", device_map="auto"), base, new_adapter=LoraSettings(r=2))
    engine.train()
    loss = engine.loss_sum(BATCH)
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad.abs().max() > 0 for p in engine.parameters())


def test_a_base_alone_has_nothing_to_train(base):
    engine = load_engine(settings(), base)
    assert engine.parameters() == []
    with engine.without_adapter():
        assert torch.isfinite(engine.loss_sum(BATCH))


def test_training_goes_on_from_an_adapter_that_fits_its_settings(base, tmp_path):
    folder = save_adapter(tmp_path / "adapter", base.path)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "ms:org/base"}))
    wanted = LoraSettings(r=4, lora_alpha=8, lora_dropout=0.0, init_adapter=str(folder))
    engine = load_engine(settings(), base, new_adapter=wanted)
    given = load_engine(settings(), base, adapter=folder)
    assert torch.equal(engine.token_losses(BATCH), given.token_losses(BATCH))
    assert given.parameters() == [] and len(engine.parameters()) == 8  # its own targets: two of two layers
    for change, said in (
        ({"r": 8}, "its r is 4"),
        ({"lora_alpha": 16}, "lora_alpha is 8"),
        ({"use_rslora": True}, "use_rslora"),
    ):
        with pytest.raises(ModelError, match=said):
            load_engine(settings(), base, new_adapter=wanted.model_copy(update=change))
    with pytest.raises(ModelError, match="trained on ms:org/base"):
        load_engine(settings(), Resolved(base.path, "org/another", "path", None), new_adapter=wanted)


def test_gradient_checkpointing_can_be_switched_on(base):
    engine = load_engine(settings(), base, new_adapter=LoraSettings(r=2), gradient_checkpointing=True)
    engine.train()
    engine.loss_sum(BATCH).backward()
    assert engine.parameters()[1].grad.abs().max() > 0


def test_an_attention_by_name_is_used(base):
    assert load_engine(settings(attn_implementation="eager"), base).isolation == "masked"
    with pytest.raises(ModelError, match="nonsense"):
        load_engine(settings(attn_implementation="nonsense"), base)


def test_stop_ids_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert stop_ids(tmp_path) == {2, 5, 6}
    (tmp_path / "generation_config.json").write_text("{")
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert stop_ids(tmp_path) == frozenset()


def test_devices_that_are_not_there_are_refused():
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "tpu", "cpu:7"):
        with pytest.raises(ConfigError, match=r"model\.device"):
            pick_device(name)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_folder_whose_weights_or_tokenizer_are_broken_says_so(base, tmp_path):
    broken = save_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="org/base: cannot be loaded"):
        load_engine(settings(), Resolved(broken, "org/base", "path", None))
    (broken / "config.json").write_text('{"model_type": "llama7"}')
    with pytest.raises(ModelError, match="llama7"):
        load_engine(settings(), Resolved(broken, "org/base", "path", None))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(broken)


def test_code_of_a_model_runs_only_when_it_is_trusted(base, tmp_path):
    folder = save_model(tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    resolved = Resolved(folder, "org/own", "path", None)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_engine(settings(), resolved)
    engine = load_engine(settings(trust_remote_code=True), resolved, new_adapter=LoraSettings(r=2))
    assert type(engine.base).__name__ == "OwnModel"
    assert torch.isfinite(engine.loss_sum(BATCH))
