"""What the page is made of, without a browser: its folder, its processes, its client of servers, its words and its form."""

import json
import os
import re
import signal
import string
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_server import MODELS, chat_server
from lorikit.config import RunConfig, load_config
from lorikit.errors import ConfigError, DataError, LorikitError, ModelError
from lorikit.web import client, process, run_view, votes
from lorikit.web.folder import data_files, inside, run_name, safe_name, save_upload
from lorikit.web.texts import SETTINGS, TEXTS

SRC = Path(process.__file__).parent


@given(st.text())
def test_an_uploaded_name_becomes_one_that_stays_in_its_folder(name):
    safe = safe_name(name)
    assert Path(safe).name == safe
    assert safe not in ("", ".", "..")
    assert not safe.startswith((".", " "))
    assert len(safe.encode()) <= 255
    assert all(char.isalnum() or char in "_.()+ -" for char in safe)


def test_names_that_are_fine_stay_as_they_are():
    for name in ("rows.json", "my rows (2).csv", "对话 数据.jsonl", "a-b_c+d.tsv"):
        assert safe_name(name) == name
    assert safe_name("../../etc/passwd.json") == "passwd.json"
    assert safe_name("C:\\data\\rows.json") == "rows.json"


def test_an_upload_never_replaces_other_content(tmp_path):
    assert save_upload(tmp_path, "rows.json", b"[1]") == "uploads/rows.json"
    assert save_upload(tmp_path, "rows.json", b"[1]") == "uploads/rows.json"
    assert save_upload(tmp_path, "rows.json", b"[2]") == "uploads/rows-2.json"
    assert (tmp_path / "uploads" / "rows.json").read_bytes() == b"[1]"
    outside = tmp_path / "outside.txt"
    outside.write_bytes(b"kept")
    (tmp_path / "uploads" / "link.json").symlink_to(outside)
    assert save_upload(tmp_path, "link.json", b"[3]") == "uploads/link-2.json"
    assert outside.read_bytes() == b"kept"
    for name, content, said in (("rows.json", b"", "is empty"), ("rows.exe", b"x", "rows are read from")):
        with pytest.raises(DataError, match=said):
            save_upload(tmp_path, name, content)


def test_only_files_with_rows_are_offered_and_none_of_a_run(tmp_path):
    for name in ("b.json", "a/c.CSV", ".hidden/d.json", "runs/x/e.jsonl", "run/adapter/f.json", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "link.json").symlink_to(tmp_path / "b.json")
    assert data_files(tmp_path) == ["a/c.CSV", "b.json"]
    assert inside(tmp_path, "a/c.CSV").is_file()
    for name in ("../secret.json", "gone.json"):
        with pytest.raises(ConfigError, match="no such file"):
            inside(tmp_path, name)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "x.", "x" * 81, ".hidden"])
def test_a_name_that_can_be_no_run_is_refused(name):
    with pytest.raises(ConfigError, match="letters, digits"):
        run_name(name)


def test_a_command_gives_its_document_or_its_own_message(tmp_path):
    (tmp_path / "faq.csv").write_text("question,answer\nwho?,me\n")
    assert process.ask(tmp_path, ["build", "./faq.csv"])["output"] is None
    with pytest.raises(LorikitError, match=r"nowhere\.yaml: no such file"):
        process.ask(tmp_path, ["plan", "nowhere.yaml"])
    with pytest.raises(LorikitError, match="took longer"):
        process.ask(tmp_path, ["plan", "nowhere.yaml"], seconds=0.01)


def test_a_started_process_is_found_again_by_its_note_and_never_mistaken(tmp_path):
    note = tmp_path / "x.json"
    assert process.running(note) is None
    started = process.start(tmp_path, ["train", "nowhere.yaml"], note)
    assert os.getsid(started.pid) == started.pid  # no signal of our terminal reaches it
    assert process.running(note) == started
    deadline = time.monotonic() + 60
    while process.running(note):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.complaint(process.log_tail(note)) == "nowhere.yaml: no such file"
    assert process.stop(note) is False
    mine = {"pid": os.getpid(), "began": 1, "command": []}  # our number, of an earlier process
    note.write_text(json.dumps(mine))
    assert process.running(note) is None
    note.write_text("{half")
    assert process.running(note) is None


def test_the_message_of_a_command_is_found_in_what_it_wrote():
    assert process.complaint("note\nlorikit: one\n  two\n") == "one\n  two"
    assert process.complaint("Traceback ...\n  File\nValueError: x\n") == "ValueError: x"
    assert process.complaint("") == ""


def test_a_run_is_seen_as_it_is_on_disk(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    assert run_view.runs(tmp_path) == []
    config = load_config(
        model={"name_or_path": "m"}, data={"train": "x.json"}, train={"output_dir": "runs/a"}
    ).model_dump_json()
    (run / "config.yaml").write_text(config)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnull\n{"step": 1, "eval_loss": 1.5}\n{"step": 2, "lo')
    seen = run_view.view(tmp_path, "a")
    assert (seen.state, seen.step, seen.best, seen.steps) == ("stopped", 1, 1.5, None)
    (run / "adapter").mkdir()
    (run / "environment.json").write_text('{"predicted": {"steps": {"count": 7}}}')
    seen = run_view.view(tmp_path, "a")
    assert (seen.state, seen.steps, seen.verdict) == ("finished", 7, None)
    (run / "compare.json").write_text('{"verdict": {"title": "learned", "reasons": []}}')
    assert run_view.view(tmp_path, "a").verdict == "learned"
    for broken in ("[1]", '{"predicted": null}', "{"):
        (run / "environment.json").write_text(broken)
        assert run_view.view(tmp_path, "a").steps is None
    with pytest.raises(ConfigError, match="there is a run a already"):
        run_view.write_settings(tmp_path, "a", {})


def test_a_run_that_another_process_trains_is_running(tmp_path):
    import fcntl

    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_view.state_of(tmp_path, "a") == "running"
    assert run_view.state_of(tmp_path, "a") == "stopped"


def test_answers_come_in_pieces_and_failures_in_the_servers_own_words():
    ask = [{"role": "user", "content": "hello"}]
    with chat_server() as url:
        assert client.models(url) == client.models(f"{url}/v1/") == MODELS
        assert list(client.answer(url, "mine", ask, {})) == ["mine ", "says: ", "hello "]
        for question, said in (("break", "fell over"), ("refuse", "line is full.*429"), ("nonsense", "no piece")):
            with pytest.raises(ModelError, match=said):
                list(client.answer(url, "mine", [{"role": "user", "content": question}], {}))
    for wrong in ("", "host:80", "file:///etc/passwd", "http://"):
        with pytest.raises(ModelError, match="is no address of a server"):
            client.models(wrong)
    with pytest.raises(ModelError, match="cannot be reached"):
        client.models(url)


def test_votes_are_counted_by_model_and_other_lines_are_passed_over(tmp_path):
    assert not votes.tally(tmp_path)
    for winner in ("a", "a", "", "b"):
        votes.keep(tmp_path, votes.new("q", ("a", "b"), ("1", "2"), winner))
    with (tmp_path / votes.FILE).open("a") as file:
        file.write("half a li\n")
    assert votes.tally(tmp_path) == {"a": 2, "": 1, "b": 1}


def places(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def test_every_word_is_there_in_both_languages_and_is_used():
    for english, chinese in [*TEXTS.values(), *SETTINGS.values()]:
        assert english
        assert chinese
        assert places(english) == places(chinese)
    code = "".join(path.read_text(encoding="utf-8") for path in SRC.glob("*.py") if path.name != "texts.py")
    asked = set(re.findall(r"(?:frame|pattern)\(\s*[\"'](\w+)[\"']", code))
    assert asked <= set(TEXTS)
    named = set(re.findall(r"[\"'](\w+)[\"']", code)) | {
        f"rows_{key}" for key in ("read", "trained", "held_out", "dropped")
    }
    assert set(TEXTS) - named - {"rows_duplicates"} == set()


def test_the_settings_in_front_exist_and_the_form_covers_all_others():
    from lorikit.config import setting_names
    from lorikit.web.form import OWN, settings_of

    assert set(SETTINGS) | set(OWN) <= set(setting_names())
    entered = {
        "model.name_or_path": "m",
        "data.train": "my rows.json",
        "train.output_dir": "runs/x",
        "data.columns": "{instruction: q, output: a}",
        "data.system": "Answer: briefly",
        "train.learning_rate": "2e-4",
        "lora.r": " 8 ",
        "train.seed": "",
    }
    config, groups = settings_of(entered)
    assert groups == {
        "model": {"name_or_path": "m"},
        "data": {"train": "my rows.json", "columns": {"instruction": "q", "output": "a"}, "system": "Answer: briefly"},
        "train": {"output_dir": "runs/x", "learning_rate": 2e-4},
    }
    assert config == RunConfig.model_validate(groups)
    with pytest.raises(ConfigError, match=r"lora\.r is 'many'.*\n?.*"):
        settings_of({**entered, "lora.r": "many"})


@given(st.text(min_size=1))
def test_a_setting_of_text_is_taken_as_it_was_typed(text):
    from lorikit.web.form import settings_of

    entered = {"model.name_or_path": "m", "data.train": "r", "train.output_dir": "o", "data.system": text}
    kept = text.strip()
    if not kept or kept == "null" or kept.startswith(("[", "{")):
        return
    assert settings_of(entered)[0].data.system == kept


def test_text_of_others_is_shown_as_it_is_by_markdown():
    from lorikit.web.frame import plain

    assert plain("a *b* $c$ [d](e) :red[f]\n<g>") == r"a \*b\* \$c\$ \[d\]\(e\) \:red\[f\]" + "  \n" + r"\<g\>"


def test_a_stopped_process_is_told_by_sigterm(tmp_path):
    note = tmp_path / "s.json"
    started = process.start(tmp_path, ["chat", "x"], note)
    assert process.stop(note) is True
    _, status = os.waitpid(started.pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
