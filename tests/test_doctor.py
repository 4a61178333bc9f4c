"""What doctor says of machines, and of run and adapter folders that are whole or not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hub_servers import Hub
from lorikit.bundled import BUNDLED
from lorikit.doctor import Report, _lacks, _verdict, doctor, lora_gib, render
from lorikit.errors import ModelError
from test_hub import model_files, write
from tiny_model import byte_level_tokenizer, save_model, save_run

WHOLE = {
    "memory_gib": 64.0,
    "torch": {"version": "2.13.0", "build": "CUDA 12.8"},
    "gpus": [],
    "cache": "/cache",
    "free_disk_gib": 100.0,
    "unmet": [],
    "extras": [],
    "hubs": {"huggingface": {"endpoint": "", "reason": None}, "modelscope": {"endpoint": "", "reason": None}},
    "bundled": {"smollm2-135m-instruct": None},
}


def gpu(gib: float, bf16: bool | None = True) -> dict[str, object]:
    return {"name": "NVIDIA Card", "memory_gib": gib, "driver": "550.1", "bf16": bf16}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LORIKIT_CACHE", str(tmp_path / "cache"))


def test_the_machine_is_described_and_offline_no_hub_is_asked(monkeypatch):
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        machine = doctor().machine
        assert hub.log == []
        assert machine["hubs"]["huggingface"]["reason"] == "HF_HUB_OFFLINE is set"
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
        machine = doctor().machine
        assert machine["hubs"]["huggingface"] == {"endpoint": hub.url, "reason": None}
        assert "refused" in machine["hubs"]["modelscope"]["reason"]
    assert machine["torch"]["version"] == torch.__version__
    assert machine["packages"]["torch"] == torch.__version__ and machine["unmet"] == []
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0 and machine["free_disk_gib"] > 0
    assert not {"test", "check"} & set(machine["extras"])
    assert list(machine["bundled"]) == list(BUNDLED)


def test_lora_of_an_8b_model_takes_about_19_gib():
    assert 18 < lora_gib(8.03) < 20


@pytest.mark.parametrize(
    ("gpus", "verdict"),
    [
        ([gpu(79.6)], "up to 32B with LoRA in bfloat16. The tutorial's 8B model fits."),
        ([gpu(23.7)], "up to 8B with LoRA in bfloat16. The tutorial's 8B model fits."),
        ([gpu(15.8, bf16=False)], "up to 3B with LoRA in float16. The tutorial's 8B model needs about 19 GiB."),
        ([gpu(3.9), gpu(11.9)], "up to 3B with LoRA in bfloat16 on one of its 2 GPUs"),
        ([gpu(2.0)], "up to 0.3B"),
        ([], "trains on its CPU with LoRA in float32: by memory up to 8B"),
        ([gpu(80, bf16=None)], "trains on its CPU"),
    ],
)
def test_the_verdict_follows_from_the_memory(gpus, verdict):
    assert verdict in _verdict(WHOLE | {"gpus": gpus})


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({}, None),
        ({"unmet": ["peft>=0.21"], "free_disk_gib": 0.1}, "Lorikit needs peft>=0.21: pip install 'peft>=0.21'"),
        ({"torch": {"error": "cannot be imported: x"}}, "torch cannot be imported: x: pip install"),
        ({"gpus": [gpu(80, bf16=None)], "torch": {"build": "the CPU alone"}}, "The NVIDIA Card is idle"),
        ({"gpus": [gpu(80, bf16=None)]}, "torch, built for CUDA 12.8, cannot use the NVIDIA Card with driver 550.1"),
        ({"gpus": [gpu(80)]}, None),
        ({"free_disk_gib": 0.4}, "Only 0.4 GiB are free for /cache"),
        ({"bundled": {"smollm2-135m-instruct": "pip install gguf"}}, "smollm2-135m-instruct: pip install gguf"),
        ({"extras": ["modelscope"]}, None),
    ],
)
def test_the_one_missing_thing_is_the_most_basic(change, first):
    found = next(_lacks(WHOLE | change), None)
    assert found is None if first is None else str(found).startswith(first)


def test_modelscopes_library_is_missing_where_only_modelscope_can_be_reached():
    hubs = {"huggingface": {"reason": "timed out"}, "modelscope": {"reason": None}}
    assert "pip install 'lorikit[modelscope]'" in next(_lacks(WHOLE | {"hubs": hubs, "extras": ["modelscope"]}))
    assert next(_lacks(WHOLE | {"hubs": hubs}), None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch uses a GPU")
def test_a_gpu_that_this_torch_cannot_use_is_listed_and_is_what_is_missing(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 550.90.07'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    report = doctor()
    assert report.machine["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "driver": "550.90.07", "bf16": None}
    ]
    assert report.missing is not None and "NVIDIA H100 80GB HBM3" in report.missing
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate'; exit 9\n")
    assert doctor().machine["gpus"] == []


def adapter(folder: Path, base: str, revision: str | None = None, value: float = 1.0) -> Path:
    """A PEFT adapter folder."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "q_proj"],
        "revision": revision,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    save_file({"q_proj.lora_A.weight": torch.full((4, 10), value)}, folder / "adapter_model.safetensors")
    return folder


def run_folder(folder: Path, base: str) -> Path:
    """A finished run with one checkpoint."""
    settings = {"model": {"name_or_path": base}, "data": {"train": "x.json"}, "train": {"output_dir": str(folder)}}
    adapter(folder / "adapter", base)
    (folder / "config.yaml").write_text(json.dumps(settings))
    checkpoint = adapter(folder / "checkpoint-10", base)
    (checkpoint / "optimizer.safetensors").write_bytes(b"x")
    (checkpoint / "state.json").write_text("{}")
    listed = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in checkpoint.iterdir()
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"files": listed}))
    return folder


@pytest.fixture
def base(tmp_path) -> str:
    return str(write(tmp_path / "base", model_files()))


def test_a_whole_run_has_no_problems(tmp_path, base):
    report = doctor(run_folder(tmp_path / "run", base))
    assert report.problems == []
    assert report.run == {
        "path": str(tmp_path / "run"),
        "kind": "run",
        "adapter": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "parameters": 40,
            "base": base,
            "revision": None,
            "base_is": "on this machine",
            "vllm": {
                "max_lora_rank": 8,
                "problems": [
                    "no tokenizer beside it: vLLM takes the base's, and its chat template instead of the run's"
                ],
            },
        },
        "checkpoints": {"checkpoint-10": []},
    }
    json.dumps(report.to_dict())


def test_every_damage_of_a_run_is_a_problem(tmp_path, base):
    run = run_folder(tmp_path / "run", base)
    (run / "checkpoint-10" / "state.json").write_text("[]")
    (run / "config.yaml").write_text("model: {name: x}")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    problems = "\n".join(doctor(run).problems)
    assert "checkpoint-10: state.json was changed after it was written" in problems
    assert "unknown setting model.name" in problems
    assert "adapter_model.safetensors: damaged or cut off" in problems


def test_an_unfinished_run_is_whole_if_a_checkpoint_is(tmp_path, base):
    import shutil

    run = run_folder(tmp_path / "run", base)
    shutil.rmtree(run / "adapter")
    assert doctor(run).problems == []
    shutil.rmtree(run / "checkpoint-10")
    assert "did not get that far" in doctor(run).problems[0]


def test_a_base_elsewhere_is_said_to_be_downloaded_when_needed(tmp_path):
    report = doctor(adapter(tmp_path / "adapter", "own/base", "a" * 40))
    assert report.run["adapter"]["base_is"] == "not on this machine; downloaded when needed"
    assert (report.run["kind"], report.problems) == ("adapter", [])


@pytest.mark.parametrize(
    ("base_name", "complaint"), [("", "does not name the base"), ("/gone/model", "the base: /gone/model: no such file")]
)
def test_a_base_that_cannot_be_had_is_a_problem(tmp_path, base_name, complaint):
    assert complaint in doctor(adapter(tmp_path / "adapter", base_name)).problems[0]


def test_values_that_are_not_finite_are_a_problem(tmp_path, base):
    assert "NaN or infinity" in doctor(adapter(tmp_path / "adapter", base, value=float("nan"))).problems[0]


def test_a_checkpoint_is_looked_at_by_itself(tmp_path, base):
    report = doctor(run_folder(tmp_path / "run", base) / "checkpoint-10")
    assert (report.run["kind"], report.run["checkpoints"], report.problems) == ("checkpoint", {"checkpoint-10": []}, [])


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_what_is_no_run_is_refused(tmp_path, make):
    make(tmp_path / "thing")
    with pytest.raises(ModelError, match="neither a run folder"):
        doctor(tmp_path / "thing")


def test_the_text_ends_with_the_verdict_and_what_is_missing(capsys):
    machine = doctor().machine | {"gpus": [gpu(15.8, bf16=False)], "extras": ["demo", "modelscope"]}
    render(Report(machine, "The verdict.", "The missing thing: a command"))
    text = capsys.readouterr().out
    assert text.split()[-6:] == ["verdict.", "The", "missing", "thing:", "a", "command"]
    assert "NVIDIA Card, 15.8 GiB, no bfloat16, driver 550.1" in text
    assert "pip install 'lorikit[demo,modelscope]'" in " ".join(text.split())


def test_the_verb_prints_text_or_one_json_document(tmp_path, base):
    run = str(run_folder(tmp_path / "run", base))
    command = [sys.executable, "-m", "lorikit", "doctor", run]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "checkpoint-10" in text and "r 4, alpha 8, 40 parameters" in text
    shown = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert set(shown) == {"machine", "verdict", "missing", "run", "problems"}


def test_doctor_says_whether_vllm_takes_an_adapter_as_it_is(tmp_path, lorikit):
    run = save_run(tmp_path / "run", save_model(tmp_path / "base"))
    told = doctor(run).run["adapter"]["vllm"]
    assert told["max_lora_rank"] == 8 and len(told["problems"]) == 1 and "no tokenizer" in told["problems"][0]
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 600, "use_dora": True}))
    byte_level_tokenizer().save_pretrained(run / "adapter")
    problems = doctor(run).run["adapter"]["vllm"]["problems"]
    assert len(problems) == 2 and "r is 600" in problems[0] and "DoRA" in problems[1]
    code, out, _ = lorikit("doctor", run)
    assert "vLLM" in out and "at most 512" in out and code == 0  # the adapter itself is whole
