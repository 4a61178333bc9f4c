import json
import shutil

import pytest

from lorikit.data.values import Message
from lorikit.errors import ConfigError, LorikitError, ModelError
from lorikit.infer.generate import answer
from lorikit.infer.session import open_run
from lorikit.model.engine import Sampling
from tiny_model import byte_level_tokenizer, save_adapter, save_model, save_run

GREEDY = Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0, repetition_penalty=1.0)
HELLO = [Message("user", "hello")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    save_run(folder / "run", save_model(folder / "base"))
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run that a test may damage; its base stays where it is."""
    return shutil.copytree(made / "run", tmp_path / "run")


def checkpoint(run, step):
    """Make checkpoint-N of the run's adapter, as training leaves it."""
    import hashlib

    folder = shutil.copytree(run / "adapter", run / f"checkpoint-{step}")
    files = {f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def text(session):
    return answer(session, [HELLO], GREEDY)[0].text


def test_run_adapter_and_checkpoint_give_the_same_answer_and_the_base_another(made, run):
    tuned = text(open_run(run))
    assert text(open_run(run / "adapter")) == tuned
    assert text(open_run(checkpoint(run, 3))) == tuned
    assert text(open_run(save_adapter(run.parent / "plain", made / "base"))) == tuned
    assert text(open_run(made / "base", need_adapter=False)) != tuned


def test_without_need_of_an_adapter_a_run_is_its_base_in_its_own_settings(made, run):
    session = open_run(run, need_adapter=False)
    assert not session.has_adapter
    assert text(session) == text(open_run(made / "base", need_adapter=False))


@pytest.mark.parametrize("quantization", ["fp8", "nf4"])
def test_a_run_on_a_quantised_base_answers_on_the_same_quantised_base(quantization, run):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    settings = json.loads((run / "config.yaml").read_text())
    settings["model"]["quantization"] = quantization
    (run / "config.yaml").write_text(json.dumps(settings))
    for folder, need in ((run, True), (run / "adapter", True), (run, False)):
        engine = open_run(folder, need_adapter=need).engine
        assert {type(w).__name__.lower() for w in (engine.weights.layers[0].qkv, engine.weights.layers[-1].down)} == {
            quantization
        }
        assert text(open_run(folder, need_adapter=need)) == text(open_run(folder, need_adapter=need))


def test_the_settings_of_training_make_the_prompt(made, tmp_path):
    run = save_run(tmp_path / "run", made / "base", {"system": "Be kind.", "template_kwargs": {"mood": "calm"}})
    template = tmp_path / "template.jinja"
    marked = byte_level_tokenizer().chat_template.replace("{{ message.role }}", "{{ message.role }} {{ mood }}")
    template.write_text(marked.replace("assistant\n", "assistant {{ mood }}\n"))
    settings = json.loads((run / "config.yaml").read_text())
    settings["data"]["template"] = str(template)
    (run / "config.yaml").write_text(json.dumps(settings))
    for folder in (run, run / "adapter", checkpoint(run, 1)):
        shown = open_run(folder).encoder
        prompt = (
            "".join(shown.tokenizer.convert_ids_to_tokens(shown.prompt_ids(HELLO))).replace("Ġ", " ").replace("Ċ", "\n")
        )
        assert prompt == (
            "<|im_start|>system calm\nBe kind.<|im_end|>\n<|im_start|>user calm\nhello<|im_end|>\n<|im_start|>assistant calm\n"
        )


def test_a_plain_adapter_brings_its_own_tokenizer_where_it_has_one(made, tmp_path):
    adapter = save_adapter(tmp_path / "plain", made / "base")
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(adapter)
    own, base = open_run(adapter).encoder.prompt_ids(HELLO), open_run(made / "run").encoder.prompt_ids(HELLO)
    assert len(own) == len(base) - 1


def test_an_unfinished_run_answers_from_its_newest_whole_checkpoint_and_says_so(run):
    tuned = text(open_run(run))
    for step in (2, 10):
        checkpoint(run, step)
    shutil.rmtree(run / "adapter")
    session = open_run(run)
    assert session.notes == (f"{run} is not finished: this is its checkpoint-10",)
    assert text(session) == tuned

    weights = run / "checkpoint-10" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    first, second = open_run(run).notes
    assert "passed over" in first
    assert "checkpoint-10" in first
    assert second.endswith("checkpoint-2")
    with pytest.raises(ModelError, match=r"checkpoint-10: .* not as it was written .*; take another checkpoint"):
        open_run(run / "checkpoint-10")


def test_a_run_without_any_adapter_says_what_to_do(run):
    shutil.rmtree(run / "adapter")
    with pytest.raises(
        ModelError, match=r"no adapter/ yet and no checkpoint; give the command that trains it once more"
    ):
        open_run(run)
    (checkpoint_1 := run / "checkpoint-1").mkdir()
    with pytest.raises(ModelError, match=rf"(?s)passed over {checkpoint_1}.*no whole checkpoint"):
        open_run(run)
    assert not open_run(run, need_adapter=False).has_adapter


def test_what_is_neither_run_nor_adapter_is_refused_with_what_would_be(made, tmp_path):
    with pytest.raises(ModelError, match=r"no such folder; a run folder holds config\.yaml"):
        open_run(tmp_path / "runs" / "typo")
    with pytest.raises(ModelError, match="this is neither"):
        open_run(tmp_path, need_adapter=False)
    with pytest.raises(ModelError, match=r"this is a base model; .* with --base"):
        open_run(made / "base")
    with pytest.raises(ModelError, match="neither a folder nor a model"):
        open_run(tmp_path / "typo", need_adapter=False)


def test_a_base_that_is_gone_is_named(run, tmp_path):
    settings = json.loads((run / "config.yaml").read_text())
    settings["model"]["name_or_path"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"run: no base \(model in .*config\.yaml\): .*gone"):
        open_run(run)


def test_a_plain_adapter_whose_base_is_not_here_says_where_its_name_stands(made, tmp_path):
    adapter = save_adapter(tmp_path / "plain", made / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, said in (("", "adapter_config.json: base_model_name_or_path is empty"), ("gone/", "no base .*: .*gone")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(ModelError, match=said):
            open_run(adapter)


def test_the_base_of_an_adapter_is_of_the_revision_it_was_trained_on(made, run):
    settings = json.loads((run / "config.yaml").read_text())
    settings["model"]["name_or_path"] = "smollm2-135m-instruct"
    (run / "config.yaml").write_text(json.dumps(settings))
    adapter = run / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps({**json.loads(adapter.read_text()), "revision": "0.0.9"}))
    for need_adapter in (True, False):
        with pytest.raises(ModelError, match=r"not 0\.0\.9"):
            open_run(run, need_adapter=need_adapter)


@pytest.mark.parametrize("content", ["{", '{"peft_type": "IA3"}', '{"peft_type": "LORA"}', "[]"])
def test_a_damaged_adapter_config_is_one_clear_error(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        open_run(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing", "other shape"])
def test_a_damaged_or_foreign_adapter_is_one_clear_error(run, made, damage, tmp_path):
    weights = run / "adapter" / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "missing":
        weights.unlink()
    else:
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        (run / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(LorikitError, match="adapter"):
        open_run(run)


def test_a_device_given_by_hand_replaces_that_of_the_run(run):
    settings = json.loads((run / "config.yaml").read_text())
    settings["model"]["device_map"] = "auto"
    (run / "config.yaml").write_text(json.dumps(settings))
    session = open_run(run, device="cpu", dtype="bfloat16")
    assert session.engine.device.type == "cpu"
    assert session.has_adapter
    with pytest.raises(ConfigError, match=r"model\.device is 'cuda:99'"):
        open_run(run, device="cuda:99")


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_the_longest_sequence_is_that_of_the_config(made, tmp_path, name):
    base = shutil.copytree(made / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["max_position_embeddings"]
    (base / "config.json").write_text(json.dumps({**config, name: 99}))
    assert open_run(base, need_adapter=False).max_length == 99
