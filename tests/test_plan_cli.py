"""`lorikit plan` as a person types it, and what `lorikit train` notes of it."""

import json
from types import SimpleNamespace

import pytest
import yaml

from hollow_model import LLAMA3_8B, save_hollow
from tiny_model import byte_level_tokenizer, save_model

ROWS = [{"instruction": f"What is {k}?", "input": "", "output": f"It is {k}."} for k in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return save_hollow(tmp_path_factory.mktemp("llama3"), LLAMA3_8B, byte_level_tokenizer())


@pytest.fixture
def here(model, tmp_path):
    rows, path, out = tmp_path / "rows.json", tmp_path / "run.yaml", tmp_path / "out"
    rows.write_text(json.dumps(ROWS))
    run = {
        "model": {"name_or_path": str(model), "device": "cpu"},
        "data": {"train": str(rows), "max_length": 200},
        "train": {"output_dir": str(out), "max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 1},
        "eval": {"eval_size": 2},
    }
    path.write_text(yaml.safe_dump(run))
    return SimpleNamespace(rows=rows, yaml=path, out=out)


def test_plan_prints_engine_steps_memory_and_time_and_writes_nothing(lorikit, here):
    code, out, err = lorikit("plan", here.yaml)
    assert (code, err) == (0, "")
    for said in ("decoder", "on CPU", "of 4 rows", "10  to train, 2 held out", "frozen weights", "a step", "tokens/s"):
        assert said in out
    assert "The run needs" in out and "fits" not in out
    assert not here.out.exists()


def test_plan_counts_the_steps_and_tokens_that_train_then_takes(lorikit, here):
    code, out, _ = lorikit("plan", here.yaml, "--train.gradient_accumulation_steps", "2", "--json")
    plan = json.loads(out)
    assert code == 0
    code, _, err = lorikit("train", here.yaml, "--no-compare", "--train.gradient_accumulation_steps", "2")
    assert code == 0 and "plan: at most" in err and "in all" in err
    last = [json.loads(line) for line in (here.out / "metrics.jsonl").read_text().splitlines()][-2]
    assert plan["steps"]["count"] == last["step"] == 4
    assert plan["steps"]["tokens_mean"] * 4 == last["tokens"]
    assert plan["rows"]["train"] == 10


def test_a_run_folder_shows_what_was_predicted_beside_what_was_measured(lorikit, here):
    lorikit("train", here.yaml, "--no-compare")
    noted = json.loads((here.out / "environment.json").read_text())
    assert noted["packages"]["torch"] and noted["measured"]["steps"] == 4
    assert noted["predicted"]["memory"]["needed"] > 0 and noted["predicted"]["time"]["step"] > 0
    code, out, err = lorikit("plan", here.out)
    assert (code, err) == (0, "")
    assert "predicted" in out and "measured" in out and "The run is finished." in out
    assert "resident set" in out
    code, out, _ = lorikit("plan", here.out, "--json")
    compared = json.loads(out)
    assert compared["finished"] and compared["measured"] == noted["measured"]
    measured = compared["measured"]["peak_memory_bytes"]
    assert measured == pytest.approx(compared["predicted"]["memory"]["needed"], rel=0.1)


def test_an_unfinished_run_is_measured_as_far_as_it_got(lorikit, here):
    lorikit("train", here.yaml, "--no-compare")
    (here.out / "adapter").rename(here.out.parent / "elsewhere")
    noted = json.loads((here.out / "environment.json").read_text())
    del noted["measured"]
    (here.out / "environment.json").write_text(json.dumps(noted))
    with (here.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    code, out, _ = lorikit("plan", here.out)
    assert code == 0 and "not finished" in out


def test_plan_for_a_gpu_that_is_not_here(lorikit, here, llama3):
    flags = ("--model.name_or_path", llama3, "--model.device", "auto")
    code, out, _ = lorikit("plan", here.yaml, *flags, "--gpu", "a100")
    assert code == 0
    assert "8.03 B" in out and "bfloat16" in out and "of A100 80GB" in out and "and fits" in out
    assert "computed: 73% and 78% of" in out
    code, out, _ = lorikit("plan", here.yaml, *flags, "--memory-gib", "24", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["fits"] is True and plan["time"] is None and plan["capacity"] == 24 * 2**30
    assert plan["memory"]["parts"]["weights"] > 14 * 2**30


def test_a_run_that_cannot_fit_exits_with_6_and_says_what_to_change(lorikit, here, llama3):
    code, out, err = lorikit("plan", here.yaml, "--model.name_or_path", llama3, "--memory-gib", "4")
    assert (code, err) == (6, "")
    assert "does not fit 4.0 GiB" in out and "GiB are missing" in out
    assert "- the frozen weights alone take 5.6 GiB" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.yaml"], 2, "no such file"),
        ([], 2, "CONFIG"),
        (["RUN", "--lora.rank", "3"], 2, "did you mean --lora.r?"),
        (["RUN", "--gpu", "voodoo2"], 2, "h100"),
        (["RUN", "--memory-gib", "0"], 2, "--memory-gib is 0"),
        (["RUN", "--memory-gib", "much"], 2, "much"),
        (["RUN", "--data.train", "nothing.json"], 3, "nothing.json"),
        (["RUN", "--data.train", "EMPTY"], 3, "EMPTY"),
        (["RUN", "--data.train", "BINARY"], 3, "BINARY"),
        (["RUN", "--data.max_length", "5"], 3, "max_length"),
        (["RUN", "--model.name_or_path", "/nowhere/model"], 4, "/nowhere/model"),
        (["RUN", "--model.name_or_path", "WEIGHTLESS"], 4, "config.json"),
        (["RUN", "--model.name_or_path", "hf:org/model"], 4, "org/model cannot be had"),
        (["RUN", "--lora.target_modules", "[x_proj]"], 2, "q_proj"),
        (["RUN", "--model.device", "cuda:9"], 2, "this machine has"),
        (["FOLDER"], 2, "without config.yaml"),
        (["OLD"], 2, "holds no prediction"),
        (["OLD", "--lora.r", "4"], 2, "settings are fixed"),
    ],
)
def test_a_mistake_is_told_in_a_line_with_the_documented_code(
    lorikit, here, model, tmp_path, monkeypatch, arguments, code, said
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    made = {name: tmp_path / f"{name}.json" for name in ("EMPTY", "BINARY")}
    made["EMPTY"].write_text("")
    made["BINARY"].write_bytes(bytes(range(128, 256)))
    made |= {name: tmp_path / name for name in ("FOLDER", "OLD", "WEIGHTLESS")} | {"RUN": here.yaml}
    for name in ("FOLDER", "OLD", "WEIGHTLESS"):
        made[name].mkdir()
    (made["WEIGHTLESS"] / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (made["OLD"] / "config.yaml").write_text(here.yaml.read_text())
    got, out, err = lorikit("plan", *(made.get(a, a) for a in arguments))
    assert (got, out) == (code, ""), err
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("lorikit: ")]) == 1
    assert "Traceback" not in err
