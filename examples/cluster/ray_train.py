"""Sixteen GPUs of a Ray cluster: python examples/cluster/ray_train.py run.yaml

Ray Train starts the processes and sets what torchrun would (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). run.yaml
and its rows must have the same path on all machines; the run folder is written where rank 0 is.
"""

import os
import subprocess
import sys
from pathlib import Path

from ray.train import ScalingConfig, get_context
from ray.train.torch import TorchTrainer


def train(settings: dict[str, str]) -> None:
    """One process of the run; Ray has opened a process group of its own here, so Lorikit gets a fresh process."""
    context = get_context()
    nodes = context.get_world_size() // context.get_local_world_size()
    port = int(os.environ["MASTER_PORT"]) + 1  # Ray's own group holds the port itself
    group = {"GROUP_WORLD_SIZE": str(nodes), "GROUP_RANK": str(context.get_node_rank())}
    environment = os.environ | group | {"MASTER_PORT": str(port)}
    subprocess.run([sys.executable, "-m", "lorikit", "train", settings["config"]], env=environment, check=True)


if __name__ == "__main__":
    scaling = ScalingConfig(num_workers=16, use_gpu=True)
    config = str(Path(sys.argv[1]).resolve())
    TorchTrainer(train, train_loop_config={"config": config}, scaling_config=scaling).fit()
