"""A merged model: what peft would merge, in the base's own type and form, handed out only when it answers as its adapter."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lorikit.errors import ModelError
from lorikit.export.fold import write_shards
from lorikit.export.merge import RECORD, merge
from lorikit.infer.session import open_run
from lorikit.model.lora_fold import read_updates, stored_tensors
from tiny_decoder import save as save_family
from tiny_model import save_adapter, save_model, save_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    save_run(folder / "run", save_model(folder / "base"))
    return folder


def state(folder):
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def test_the_merged_model_is_what_peft_merges_and_loads_with_plain_transformers(made, tmp_path, lorikit):
    code, out, err = lorikit("merge", made / "run", "-o", tmp_path / "m")
    assert (code, out.strip()) == (0, str(tmp_path / "m")), err
    assert "4 matrices folded" in err and "20 of 20 greedy answers are equal" in err
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    want = PeftModel.from_pretrained(base, made / "run" / "adapter").merge_and_unload()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, want(ids).logits)
    encoder = open_run(made / "run").encoder
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.chat_template == encoder.tokenizer.chat_template
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).endswith("assistant\n")
    assert model.generation_config.eos_token_id in encoder.stop_ids
    assert not list(tmp_path.glob(".staging*"))


def test_json_tells_the_proof_and_nothing_else_is_on_stdout(made, tmp_path, lorikit):
    code, out, _ = lorikit("merge", made / "run", "-o", tmp_path / "m", "--json")
    told = json.loads(out)
    assert code == 0 and told["num_matrices"] == 4 and told["num_files"] == 1
    proof = told["proof"]
    assert (proof["num_prompts"], proof["num_equal"], proof["differing"]) == (20, 20, [])
    assert 0 <= proof["logit_difference"] <= proof["bound"] < 1e-3
    assert json.loads((tmp_path / "m" / RECORD).read_text())["proof"] == proof
    assert "/" not in json.loads((tmp_path / "m" / RECORD).read_text())["base"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_bases_type_and_are_rounded_once(dtype, tmp_path):
    base = save_family(tmp_path / "base", "llama", dtype=dtype).path
    adapter = peft_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", target_modules="all-linear")
    tensors = stored_tensors(base)
    updates = read_updates(adapter, tensors)
    (tmp_path / "m").mkdir()
    write_shards(tmp_path / "m", tensors, updates)
    before, after = state(base), state(tmp_path / "m")
    assert len(updates) == 14 and before.keys() == after.keys()
    for name, tensor in before.items():
        want = tensor.float()
        if name in updates:
            want = want + updates[name].scale * (updates[name].b @ updates[name].a)
        assert after[name].dtype == dtype and torch.equal(after[name], want.to(dtype)), name


def peft_adapter(model, folder, **values):
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **values}))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"0.self_attn.q_proj": 5, "up_proj": 3},
        },
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "lora_alpha": 3},
    ],
)
def test_every_kind_of_plain_lora_is_scaled_as_peft_scales_it(values, tmp_path):
    base = save_family(tmp_path / "base", "llama").path
    adapter = peft_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", **values)
    assert_merges_as_peft(base, adapter, tmp_path / "m")


def test_a_model_whose_weights_are_stored_transposed_is_merged_too(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=60, n_positions=64)).save_pretrained(
        tmp_path / "base"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = peft_adapter(model, tmp_path / "a", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert_merges_as_peft(tmp_path / "base", adapter, tmp_path / "m")


def assert_merges_as_peft(base, adapter, output):
    output.mkdir()
    tensors = stored_tensors(base)
    write_shards(output, tensors, read_updates(adapter, tensors))
    shutil.copy(base / "config.json", output)
    want = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    )
    got = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_shards_are_small_listed_and_load_as_one_file_would(made, tmp_path):
    merged = merge(made / "run", tmp_path / "m", shard_bytes=20_000)
    files = sorted(tmp_path.glob("m/model-*.safetensors"))
    assert len(files) == merged.num_files > 3
    one_alone = 264 * 32 * 4  # the embedding is larger than a shard may be
    assert all(path.stat().st_size < max(20_000, one_alone) + 4_000 for path in files)
    whole = merge(made / "run", tmp_path / "whole").folder
    got, want = state(tmp_path / "m"), state(whole)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.vocab_size > 256
    again = merge(save_run(tmp_path / "run2", tmp_path / "m"), tmp_path / "twice")  # a base in shards
    assert again.num_matrices == 4


def test_what_does_not_answer_as_its_adapter_is_removed(made, tmp_path, lorikit):
    run = shutil.copytree(made / "run", tmp_path / "run")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({n: t * 400 for n, t in weights.items()}, run / "adapter" / "adapter_model.safetensors")
    code, out, err = lorikit("merge", run, "-o", tmp_path / "m", "--dtype", "float16")  # beyond 65504
    assert (code, out) == (4, "") and "so it was removed" in err and "--dtype float32" in err
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".staging*"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "only LORA"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(change, reason, made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=reason):
        merge(run, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_adapter_of_another_model_is_refused_with_all_that_does_not_fit(made, tmp_path):
    other = save_family(tmp_path / "other", "llama").path
    with pytest.raises(ModelError, match=r"B A is .*; .*B A is"):
        read_updates(made / "run" / "adapter", stored_tensors(other))


def test_places_that_are_taken_are_left_alone(made, tmp_path, lorikit):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for place, reason in (
        (tmp_path / "notes.txt", "is a file"),
        (tmp_path / "full", "holds other files"),
        (tmp_path / "no" / "m", "no folder"),
        (made / "base", "holds other files"),
    ):
        code, _, err = lorikit("merge", made / "run", "-o", place, "--force")
        assert code == 2 and reason in err
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert lorikit("merge", made / "run", "-o", tmp_path / "m")[0] == 0
    assert lorikit("merge", made / "run", "-o", tmp_path / "m")[0] == 2
    assert lorikit("merge", made / "run", "-o", tmp_path / "m", "--force")[0] == 0


def test_a_full_disk_is_said_before_anything_is_written(made, tmp_path, monkeypatch, lorikit):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = lorikit("merge", made / "run", "-o", tmp_path / "m")
    assert code == 7 and "GB are free" in err and not list(tmp_path.iterdir())


def test_a_base_alone_and_an_unknown_type_are_usage_errors(made, tmp_path, lorikit):
    assert lorikit("merge", made / "base", "-o", tmp_path / "m")[0] == 4
    assert lorikit("merge", made / "run", "-o", tmp_path / "m", "--dtype", "int4")[0] == 2
    assert save_adapter(tmp_path / "plain", made / "base").is_dir()
    assert lorikit("merge", tmp_path / "plain", "-o", tmp_path / "m")[0] == 0
