import io
import json
import resource
import sys
import types

import pytest
import torch
from rich.console import Console

from lorikit.config import RunConfig
from lorikit.errors import ConfigError, DiskError
from lorikit.train.metrics import MetricsFile, check_trackers, numbers_of, open_trackers, peak_memory
from lorikit.train.progress import Report

LINE = {
    "step": 20,
    "epoch": 0.4,
    "loss": 2.13456,
    "learning_rate": 9.1e-5,
    "grad_norm": 0.7,
    "tokens": 100,
    "labelled_tokens": 40,
    "tokens_per_second": 1234.4,
    "peak_memory_bytes": 1288490189,
    "seconds": 12.5,
}
EVALUATION = {
    "step": 20,
    "epoch": 1.0,
    "eval_loss": 1.5,
    "eval_perplexity": 4.4817,
    "best": True,
    "answers": [{"prompt": "你是谁?", "answer": "[甄嬛]"}],
    "seconds": 13.0,
}


def run_config(tmp_path, **train):
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "d"},
            "train": {"output_dir": str(tmp_path), **train},
        }
    )


def test_lines_are_json_objects_and_reach_the_file_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(LINE)
    file.write(EVALUATION)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [LINE, EVALUATION]
    assert "你是谁" in lines[1]
    file.sync()
    assert file.length() == (tmp_path / "metrics.jsonl").stat().st_size
    file.close()


def test_what_was_written_after_the_checkpoint_is_cut_off_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1})
    kept = file.length()
    file.write({"step": 2})
    file.close()
    resumed = MetricsFile(path, kept)
    resumed.write({"step": 2, "again": True})
    resumed.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "again": True}]


@pytest.mark.parametrize(
    ("content", "keep", "left"), [(b'{"a":1}\n{"b"', 99, b'{"a":1}\n'), (b"", 50, b""), (b"x", 9, b"")]
)
def test_half_a_line_or_a_file_that_lost_its_end_does_not_stop_a_resume(tmp_path, content, keep, left):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    MetricsFile(path, keep).close()
    assert path.read_bytes() == left


def test_a_metrics_file_that_cannot_be_written_is_a_disk_error(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: File too large"):
            file.write(LINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl", 0)


def test_peak_memory_of_a_process_is_in_bytes():
    block = torch.ones(20_000_000)  # 80 MB
    assert 80_000_000 < peak_memory(torch.device("cpu")) < 64 * 2**30
    assert block.sum() == 20_000_000


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"wandb, which is not installed: pip install wandb"):
        check_trackers(["wandb"])
    check_trackers([])


def test_tensorboard_gets_every_number_of_a_line_and_forgets_what_a_resume_cut_off(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(tmp_path, report_to=["tensorboard"])
    for first, last, value in ((0, 3, 1.0), (2, 4, 2.0)):
        (tracker,) = open_trackers(config, tmp_path, first)
        for step in range(first + 1, last + 1):
            tracker.log(numbers_of({"step": step, "loss": value, "best": True, "answers": []}), step)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_clients_are_opened_to_resume_and_fed_and_finished(tmp_path, monkeypatch, capsys, name):
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **settings: calls.append(settings)
    module.log = lambda numbers, step: calls.append((numbers, step))
    module.finish = lambda: (print("uploading"), calls.append("finish"))
    monkeypatch.setitem(sys.modules, name, module)
    (tracker,) = open_trackers(run_config(tmp_path, report_to=[name]), tmp_path, 5)
    tracker.log(numbers_of(LINE), 20)
    tracker.close()
    assert "id" not in calls[0] or calls[0]["id"].startswith(tmp_path.name)
    assert calls[0]["name"] == tmp_path.name and calls[0]["resume"] == "allow"
    assert calls[0]["config"]["train"]["report_to"] == [name]
    assert calls[1] == ({key: value for key, value in LINE.items() if key != "step"}, 20)
    assert calls[2] == "finish"
    assert capsys.readouterr().out == ""


def test_a_client_that_cannot_start_is_a_setting_to_change(tmp_path, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("api_key not configured")

    module = types.ModuleType("wandb")
    module.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=r"train\.report_to: wandb cannot start: api_key not configured"):
        open_trackers(run_config(tmp_path, report_to=["wandb"]), tmp_path, 0)


def report(**options):
    return Report(Console(file=io.StringIO(), width=100, highlight=False, **options))


def test_without_a_terminal_there_is_one_plain_line_for_each_logged_one():
    shown = report()
    shown.start(100, 0)
    for step in range(1, 21):
        shown.step(step, step / 50, 2.0, 1000.0, 2**30)
    shown.line(LINE)
    shown.line(EVALUATION)
    shown.stop()
    text = shown.console.file.getvalue()
    lines = text.splitlines()
    assert lines[0].startswith("step 20/100  epoch 0.40  loss 2.1346  lr 9.10e-05  1,234 tokens/s  1.2 GiB  ETA 0:00:")
    assert lines[1] == "step 20/100  held-out loss 1.5000  perplexity 4.48  best so far"
    assert lines[2] == "  你是谁? -> [甄嬛]"
    assert len(lines) == 3 and "\x1b" not in text


def test_on_a_terminal_the_live_line_shows_every_step_and_is_taken_away_at_the_end():
    shown = report(force_terminal=True, color_system="truecolor")
    shown.start(100, 10)
    shown.step(11, 0.2, 2.5, 1000.0, 3 * 2**30)
    shown._live.refresh()
    shown.line(LINE)
    shown.say("[bold]kept as it is[/bold]")
    shown.stop()
    text = shown.console.file.getvalue()
    assert "step 11/100" in text and "loss 2.5000" in text and "3.0 GiB" in text
    assert "loss 2.1346" not in text and "[bold]kept as it is[/bold]" in text
    assert text.rstrip().endswith("\x1b[2K") or "\x1b[?25h" in text


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    shown = report(force_terminal=True)
    shown.start(10, 0)
    shown.step(1, 0.1, 2.0, 10.0, 2**30)
    shown._live.refresh()
    shown.stop()
    text = shown.console.file.getvalue()
    assert "step 1/10" in text and "\x1b[3" not in text and "\x1b[38" not in text


def test_the_time_left_is_that_of_the_steps_of_this_process():
    shown = report()
    shown.start(1000, 900)
    done, since = shown._first
    shown._first = (done, since - 100.0)  # as if 100 s had gone by
    assert shown._eta(950) == "0:01:40"
    shown._num_steps = 10**6
    assert shown._eta(901).count(":") == 2
