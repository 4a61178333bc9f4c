"""The command line as a person types it: what stands on stdout, what on stderr, and the exit code."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tiny_model import save_model, save_run

ROWS = [{"instruction": f"What is {k}?", "input": "", "output": f"It is {k}."} for k in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), model)


@pytest.fixture
def run_yaml(model, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    path = tmp_path / "run.yaml"
    settings = {
        "model": {"name_or_path": str(model)},
        "data": {"train": str(tmp_path / "rows.json"), "max_length": 200},
        "train": {"output_dir": str(tmp_path / "out"), "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3},
        "eval": {"eval_size": 2, "prompts": ["What is 3?"], "max_new_tokens": 3},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_train_prints_the_run_folder_and_flags_win(lorikit, run_yaml, tmp_path):
    code, out, err = lorikit("train", run_yaml, "--lora.r", "3", "--train.seed=7", "--no-compare")
    assert (code, out.strip()) == (0, str(tmp_path / "out"))
    assert "12 rows read: 10 to train, 2 held out" in err
    assert "step 2/2" in err and "held-out loss" in err and "tokens/s" in err
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (written["lora"]["r"], written["train"]["seed"]) == (3, 7)
    code, out, err = lorikit("train", run_yaml, "--lora.r", "3", "--train.seed=7", "--no-compare", "--json")
    assert code == 0 and "finished" in err
    assert json.loads(out)["adapter"] == str(tmp_path / "out" / "adapter")
    code, _, err = lorikit("train", run_yaml, "--lora.r", "4", "--train.seed=7")
    assert code == 2 and "lora.r" in err


def test_generate_answers_in_the_order_of_the_prompts(lorikit, finished, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a much longer question than the other"}\n{"messages": [{"role": "user", "content": "b"}]}\n'
    )
    code, out, _ = lorikit("generate", finished, "--file", prompts, "--greedy", "--max-new-tokens", 4, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows[0]["prompt"] == "a much longer question than the other" and rows[1]["messages"][0]["content"] == "b"
    assert all("answer" in row and row["finish"] in ("stop", "length") for row in rows)
    code, out, _ = lorikit("generate", finished, "--prompt", "b", "--greedy", "--max-new-tokens", 4)
    assert (code, out) == (0, rows[1]["answer"] + "\n")


def test_generate_ends_an_answer_before_a_stop_text_and_takes_the_settings_of_sampling(lorikit, finished):
    asked = ["generate", finished, "--prompt", "hello", "--max-new-tokens", 12]
    whole = lorikit(*asked, "--greedy")[1].removesuffix("\n")
    assert len(whole) > 4
    cut = whole[3:5]
    code, out, _ = lorikit(*asked, "--greedy", "--stop", cut)
    assert (code, out) == (0, whole[: whole.index(cut)] + "\n")
    assert lorikit(*asked, "--top-k", 1, "--repetition-penalty", 1)[:2] == (0, whole + "\n")
    assert lorikit(*asked, "--min-p", 1, "--repetition-penalty", 1)[:2] == (0, whole + "\n")
    assert lorikit(*asked, "--min-p", 2)[0] == 2


def test_generate_with_base_leaves_the_adapter_out(lorikit, finished, model):
    answers = [
        lorikit("generate", name, "--prompt", "hello", "--greedy", "--max-new-tokens", 8, *more)[1]
        for name, more in ((finished, []), (model, ["--base"]))
    ]
    assert answers[0] != answers[1]


def test_check_accounts_for_every_row_and_exits_with_3_if_rows_are_refused(lorikit, model, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([*ROWS, ROWS[0], {"instruction": "x" * 500, "output": "y"}]))
    code, out, _ = lorikit("check", rows, "--model", model, "--max-length", 200, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["rows"]["read"] == 14 and report["rows"]["duplicates"] == 1
    rows.write_text(json.dumps([*ROWS, {"instruction": "no answer", "output": ""}]))
    code, out, err = lorikit("check", rows, "--model", model, "--max-length", 200)
    assert code == 3 and "rows.json:1" in out + err
    code, out, err = lorikit("check", rows, "--model", model, "--data.on_bad_row", "skip")
    assert code == 0


def test_train_says_in_short_what_check_finds_and_no_text_can_steer_the_terminal(lorikit, run_yaml, tmp_path):
    rows = [
        *ROWS,
        {"instruction": "What is \x1b[2J?", "output": "One."},
        {"instruction": "What is \x1b[2J?", "output": "Two."},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    code, _, err = lorikit("train", run_yaml, "--train.max_steps", 1, "--no-compare")
    assert code == 0 and "\x1b[2J" not in err
    assert (
        "warning: rows whose prompt has several answers (2 in 1 group), first rows.json:1" in err and "\\x1b[2J" in err
    )
    assert "warning: invisible, misplaced or wrongly decoded characters (2), first rows.json:1" in err
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert {finding["kind"] for finding in report["findings"]} == {"characters", "several_answers"}


def test_check_finds_rows_of_the_evaluation_file_that_are_trained(lorikit, model, tmp_path):
    rows = [{"instruction": f"{word}?", "output": f"{word} it is"} for word in ("salt", "bread", "rain", "figs")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "held_out.json").write_text(json.dumps([rows[2], {"instruction": "moss?", "output": "green"}]))
    files = [str(tmp_path / "rows.json"), "--eval.data", str(tmp_path / "held_out.json")]
    code, out, err = lorikit("check", *files, "--model", str(model), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["rows"]["read"] == 6 and found["rows"]["held_out"] == 2
    (leak,) = [one for one in found["findings"] if one["kind"] == "leaks"]
    assert any("held_out.json:1" in row for place in leak["places"] for row in place["rows"])


def test_check_fix_writes_the_mended_rows_beside_what_was_done(lorikit, model, tmp_path):
    (tmp_path / "rows.json").write_text(
        json.dumps([*ROWS, ROWS[0], {"instruction": "a\u200bb", "output": "long enough"}])
    )
    command = ["check", tmp_path / "rows.json", "--model", model, "--fix", tmp_path / "clean.json"]
    code, out, _ = lorikit(*command, "--json")
    assert code == 0
    assert json.loads(out)["fix"] == {
        "rows": 13, "removed": 1, "changed": 1,
        "file": str(tmp_path / "clean.json"), "changes": str(tmp_path / "clean.json.changes.jsonl"),
    }  # fmt: skip
    assert len(json.loads((tmp_path / "clean.json").read_text())) == 13
    assert len((tmp_path / "clean.json.changes.jsonl").read_text().splitlines()) == 2
    code, _, err = lorikit(*command)
    assert code == 2 and "--force" in err
    assert lorikit(*command[:-1], tmp_path / "rows.json", "--force")[0] == 2
    assert lorikit(*command[:-1], tmp_path / "rows.xml")[0] == 2


def test_config_prints_the_resolved_run_or_every_setting_or_the_schema(lorikit, run_yaml):
    code, out, _ = lorikit("config", run_yaml, "--lora.r", "5")
    assert code == 0 and yaml.safe_load(out)["lora"]["r"] == 5
    assert "gradient_accumulation_steps: 4" in lorikit("config")[1]
    assert json.loads(lorikit("config", "--schema")[1])["additionalProperties"] is False


def test_download_of_a_path_prints_it_last(lorikit, model):
    code, out, _ = lorikit("download", model)
    assert (code, out.splitlines()[-1]) == (0, str(model))
    assert json.loads(lorikit("download", model, "--json")[1])["hub"] == "path"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian", "x"], 2, "Did you mean"),
        (["train"], 2, "CONFIG"),
        (["train", "missing.yaml"], 2, "no such file"),
        (["train", "RUN", "--lora.rank", "3"], 2, "did you mean --lora.r?"),
        (["train", "RUN", "--lora.r", "0"], 2, "lora.r is 0"),
        (["train", "RUN", "--model.name_or_path", "/nowhere/model"], 4, "/nowhere/model"),
        (["train", "RUN", "--model.device", "cuda:9"], 2, "this machine has"),
        (["train", "RUN", "--data.train", "nothing.json"], 3, "nothing.json"),
        (["train", "RUN", "--lora.target_modules", "[x_proj]"], 2, "q_proj"),
        (["train", "RUN", "--data.max_length", "5"], 3, "max_length"),
        (["train", "RUN", "--train.output_dir", "RUN"], 2, "output_dir"),
        (["train", "RUN", "--train.report_to", "[wandb]"], 2, "wandb"),
        (["generate", "FINISHED"], 2, "--prompt"),
        (["generate", "FINISHED", "--prompt", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "FINISHED", "--prompt", "x", "--max-new-tokens", "many"], 2, "many"),
        (["generate", "FINISHED", "--file", "nothing.jsonl"], 3, "nothing.jsonl"),
        (["generate", "FINISHED", "--prompt", "x" * 2000], 3, "tokens"),
        (["generate", "nowhere/run", "--prompt", "x"], 4, "nowhere/run"),
        (["chat", "nowhere/run"], 4, "nowhere/run"),
        (["check", "--model", "MODEL"], 2, "needs a file"),
        (["check", "rows.csv", "--model", "MODEL"], 3, "rows.csv"),
        (["download", "x", "--hub", "github"], 2, "modelscope"),
        (["config", "missing.yaml"], 2, "no such file"),
    ],
)
def test_a_mistake_is_one_or_two_lines_on_stderr_and_the_documented_code(
    lorikit, run_yaml, finished, model, arguments, code, said, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stands_for = {"RUN": run_yaml, "FINISHED": finished, "MODEL": model}
    got, out, err = lorikit(*(stands_for.get(a, a) for a in arguments))
    assert got == code, err
    assert out == ""
    assert said in err
    complaint = [line for line in err.splitlines() if line.startswith("lorikit: ")]
    assert len(complaint) == 1
    assert "Traceback" not in err


INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "cyclopts":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("lorikit", run_name="__main__")
"""


def test_an_interrupt_while_the_command_line_is_being_imported_is_no_traceback():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_reader_that_closes_the_pipe_is_no_error():
    command = f"{sys.executable} -m lorikit config | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stdout_that_is_not_utf8_shows_escapes_instead_of_a_traceback(model, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "你好", "output": "世界"}]', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lorikit", "check", str(tmp_path / "rows.json"), "--model", str(model)],
        capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u4f60" in done.stdout
