"""`lorikit train --gpus N`: torchrun's own agent in this process, which starts N of them and ends as they end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from lorikit.errors import ConfigError, Interrupted
from lorikit.train.join import started_by_torchrun

_SHUTDOWN = 600  # seconds to finish a step and save after a signal, before torch's agent kills
_KNOWN = (2, 3, 4, 5, 6, 7, 75, 130)


def launch(arguments: Sequence[str], count: int) -> None:
    """Run `lorikit ARGUMENTS` in `count` processes of this machine, a GPU for each where there are any.

    Ends this process with their exit code, after what they printed; Interrupted after a signal, which they all got, and when
    one of them was killed. ConfigError for a count that the machine does not have.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if started_by_torchrun():
        raise ConfigError("--gpus starts the processes itself; under torchrun leave it out")
    if count < 1 or 0 < gpus < count:
        raise ConfigError(f"--gpus is {count}; this machine has {gpus or 'none, where it starts that many processes'}")
    for name in ("api", "agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # the processes say it better
    # As many threads as alone, in all; torch's own code sets 1 a process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lorikit", *arguments)
    except SignalException:  # of which rank 0 has told
        raise SystemExit(Interrupted.exit_code) from None
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        known = [code for code in codes.values() if code in _KNOWN]
        killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
        if killed and set(known) <= {Interrupted.exit_code} and 1 not in codes.values():
            rank, number = next(iter(killed.items()))
            raise Interrupted(
                f"process {rank} was killed by signal {number} (9 is often the machine, short of memory); the same command "
                "goes on from the newest checkpoint"
            ) from None
        raise SystemExit(max(known, default=1)) from None
