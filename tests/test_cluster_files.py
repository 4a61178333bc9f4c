"""The launch files of examples/cluster are taken by the programs that they are for, where these are installed."""

import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"


def test_bash_reads_the_file_for_slurm_and_its_options_stand_before_the_first_command():
    file = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", file], check=True)
    lines = [line for line in file.read_text().splitlines() if line]
    options = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [n for n, line in enumerate(lines) if not line.startswith("#")]
    assert len(options) == 7 and max(options) < min(commands), "Slurm stops reading options there"


def test_skypilot_makes_a_task_of_its_file(monkeypatch, tmp_path):
    sky = pytest.importorskip("sky")
    monkeypatch.chdir(FOLDER.parents[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    task = sky.Task.from_yaml(str(FOLDER / "skypilot.yaml"))
    assert task.num_nodes == 2
    assert {resources.accelerators["H100"] for resources in task.resources} == {8}
    assert "-m lorikit train run.yaml" in task.run


def test_ray_train_takes_the_trainer_of_its_file():
    pytest.importorskip("ray.train.torch")
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    code = compile((FOLDER / "ray_train.py").read_text(), "ray_train.py", "exec")
    found: dict[str, object] = {"__name__": "ray_train"}
    exec(code, found)  # its main part needs a cluster
    trainer = TorchTrainer(
        found["train"],
        train_loop_config={"config": "run.yaml"},
        scaling_config=ScalingConfig(num_workers=16, use_gpu=True),
    )
    assert trainer.scaling_config.total_resources["GPU"] == 16
