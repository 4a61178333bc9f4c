"""Settings: flags over YAML over defaults, and every mistake named with what is allowed."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.config import RunConfig, describe, dump_config, load_config, setting_names
from lorikit.errors import ConfigError

RUN = """\
model: {name_or_path: org/name}
data: {train: rows.json}
train: {output_dir: runs/x, learning_rate: 1e-4}
"""


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_the_tutorials_settings_are_there_under_their_own_names(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name_or_path: LLM-Research/Meta-Llama-3-8B-Instruct, dtype: bfloat16}\n"
        "data: {train: huanhuan.json, max_length: 384}\n"
        "lora: {task_type: CAUSAL_LM, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj],\n"
        "       inference_mode: false, r: 8, lora_alpha: 32, lora_dropout: 0.1}\n"
        "train: {output_dir: output, per_device_train_batch_size: 4, gradient_accumulation_steps: 4, logging_steps: 10,\n"
        "        num_train_epochs: 3, save_steps: 100, learning_rate: 1e-4, save_on_each_node: true,\n"
        "        gradient_checkpointing: true}\n"
    )
    config = load_config(path)
    assert config.train.learning_rate == 1e-4
    assert len(config.lora.target_modules) == 7
    assert not config.model.trust_remote_code


def test_there_are_at_most_60_settings_each_with_a_meaning():
    names = setting_names()
    assert len(names) <= 60
    assert all(meaning and "\n" not in meaning for meaning in names.values())
    assert {name.split(".")[0] for name in names} == {"model", "data", "lora", "train", "eval"}


def test_flags_win_over_the_file_and_the_file_over_the_defaults(run_yaml):
    config = load_config(run_yaml, ["--lora.r", "16", "--train.learning-rate=2e-4", "--train.gradient_checkpointing"])
    assert (config.lora.r, config.train.learning_rate, config.train.gradient_checkpointing) == (16, 2e-4, True)
    assert config.lora.lora_alpha == 32
    assert load_config(run_yaml, ["--lora.target_modules", "[q_proj, v_proj]"]).lora.target_modules == [
        "q_proj",
        "v_proj",
    ]
    assert load_config(run_yaml, ["--data.columns.instruction", "q"]).data.columns == {"instruction": "q"}
    assert load_config(run_yaml, ["--train.max_steps", "-1"]).train.max_steps == -1
    assert load_config(run_yaml, ["--data.system="]).data.system == ""


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "0.0001", "1e-04"])
def test_a_small_number_may_be_written_in_any_way(run_yaml, text):
    assert load_config(run_yaml, ["--train.learning_rate", text]).train.learning_rate == pytest.approx(1e-4)


def test_the_resolved_yaml_reads_back_equal(run_yaml, tmp_path):
    config = load_config(
        run_yaml, ["--data.system", "你好: {a}", "--eval.prompts", "['who?', 'a: b']", "--lora.r", "3"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora.rank", "4"], "--lora.r?"),
        (["--train.lr", "4"], "unknown flag --train.lr"),
        (["--lora.leraning_rate", "1"], "--train.learning_rate?"),
        (["--lora.r", "0"], "lora.r is 0"),
        (["--lora.r", "eight"], "--lora.r is 'eight'"),
        (["--lora.r"], "--lora.r needs a value"),
        (["--lora.r", "--train.seed", "3"], "--lora.r needs a value"),
        (["--data.system"], "--data.system needs a value"),
        (["--lora", "8"], "--lora is 8: it is a group of settings: r, lora_alpha"),
        (["--lora.lora_dropout", "1.0"], "lora.lora_dropout is 1.0"),
        (["--train.learning_rate", ".nan"], "finite"),
        (["--train.learning_rate", "-1"], "greater than 0"),
        (["--model.dtype", "fp8"], "'bfloat16'"),
        (["--train.max_steps", "0"], "max_steps is 0"),
        (["--train.warmup_steps", "5", "--train.warmup_ratio", "0.1"], "keep one"),
        (["--eval.eval_size", "2.5"], "whole number"),
        (["--eval.eval_size", "0", "--eval.early_stopping_patience", "2"], "held-out rows"),
        (["--model.device", "cpu", "--model.device_map", "auto"], "keep one"),
        (["--model.quantization", "int8"], "model.quantization is 'int8': it should be 'none', 'fp8' or 'nf4'"),
        (["--model.quantization", "fp8", "--model.engine", "generic"], "model.engine: auto or decoder"),
        (["--model.quantization", "fp8", "--model.dtype", "float16"], "model.dtype: auto or bfloat16"),
        (["--model.quantization", "fp8", "--model.device_map", "auto"], "which model.device_map excludes"),
        (["--model.quantization", "fp8", "--model.trust_remote_code"], "which model.trust_remote_code excludes"),
        (["--lora.inference_mode", "true"], "lora.inference_mode"),
        (["--data.train", "[]"], "data.train"),
        (["--train.report_to", "[mlflow]"], "'tensorboard'"),
        (["--lora.target_modules", "[q_proj, 1]"], "lora.target_modules"),
        (["--data.columns", "{a: [1]}"], "data.columns"),
        (["stray"], "unexpected argument 'stray'"),
        (["--lora.r", "[1"], "not valid YAML"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_name_and_what_is_allowed(run_yaml, flags, said):
    with pytest.raises(ConfigError) as raised:
        load_config(run_yaml, flags)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected the groups"),
        ("- a\n- b\n", "a list"),
        ("model: {nam: x}", "did you mean model.name_or_path?"),
        ("trian: {}", "did you mean train?"),
        ("lora: 3", "lora is 3"),
        ("model: {name_or_path: a}\nmodel: {name_or_path: b}", "set twice"),
        ("train: {seed: 1, seed: 2}", "set twice"),
        ("model: [", "1:9"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: &a [*a]", ""),
        ("model: \x00", "not valid YAML"),
        ("? [a, b]\n: c", "plain word"),
        ("train: {learning_rate: 1_0}", ""),
    ],
)
def test_a_file_that_cannot_be_a_run_says_where_it_is_wrong(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "utf16.yaml").write_bytes(RUN.encode("utf-16"))
    for path, said in (
        (tmp_path / "no.yaml", "no such file"),
        (tmp_path, "a folder"),
        (tmp_path / "utf16.yaml", "UTF-8"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(path)


def test_a_byte_order_mark_is_no_harm(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RUN.encode())
    assert load_config(path).data.train == "rows.json"


def test_all_problems_are_told_at_once(run_yaml):
    with pytest.raises(ConfigError) as raised:
        load_config(run_yaml, ["--lora.r", "0", "--lora.lora_dropout", "7", "--model.dtype", "x"])
    assert len(str(raised.value).splitlines()) == 3


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
groups = st.sampled_from([*RunConfig.model_fields, "other"])
names = st.sampled_from([name.split(".")[1] for name in setting_names()]) | st.text(max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(groups, json_values | st.dictionaries(names, json_values, max_size=4), max_size=5))
def test_any_mapping_is_a_run_or_a_config_error(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        config = load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(config, RunConfig)


def test_settings_cannot_be_changed_afterwards(run_yaml):
    with pytest.raises(ValueError, match="frozen"):
        load_config(run_yaml).lora.r = 3


def test_the_schema_and_the_description_name_every_setting():
    schema = json.dumps(RunConfig.model_json_schema())
    described = yaml.safe_load(describe())
    for name, meaning in setting_names().items():
        group, key = name.split(".")
        assert json.dumps(meaning)[1:-1] in schema
        assert key in described[group]
