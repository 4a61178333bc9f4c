"""Joining the processes that torchrun started for one run, and ending with them: one message, one exit code."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from lorikit import errors
from lorikit.errors import ConfigError, Interrupted, LorikitError
from lorikit.train.distributed import PATIENCE, LostRank, Ranks
from lorikit.train.pulse import Pulse
from lorikit.train.signals import Signals

_LAST_WORDS = 3.0  # seconds in which a rank that failed may still say why
_ANSWER = timedelta(seconds=10)  # of the store, to who watches signs of life


def started_by_torchrun() -> bool:
    """Whether this process is one of a group; asks the environment alone."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def speaks() -> bool:
    """Whether this process is the one whose results are printed."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


@contextmanager
def join(signals: Signals) -> Iterator[Ranks]:
    """This process among those that torchrun started with it, connected while the block runs; alone without torchrun.

    On GPUs each rank takes the one of its local rank. An error that a user can cause ends all ranks with its exit code and
    is printed once: by rank 0, or with its number by the rank that alone had it.
    """
    if not started_by_torchrun():
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    ranks, failed = _connect(), True
    try:
        yield ranks
        failed = False
    except LorikitError as error:
        signals.hold()
        _end_as_one(ranks, error)
    except LostRank as lost:
        signals.hold()
        if dist.group.WORLD is not None and torch.cuda.is_available():
            with suppress(RuntimeError):
                dist.group.WORLD.abort()  # or the end of this process would wait for the one that is gone
        _end_as_one(ranks, Interrupted(f"another process of this run is gone ({lost}); the same command goes on"))
    finally:
        if ranks.pulse:
            ranks.pulse.stop()
        if failed and ranks.lost():
            atexit.register(_leave)  # without what waits for the lost machine in threads of torch's
        else:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _leave() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Interrupted.exit_code)


def _connect() -> Ranks:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # where torch.distributed has them from

    values = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, size, local = values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local:
        raise ConfigError(
            f"process {local} of this machine has no GPU: there are {gpus}; start at most as many processes"
        )
    if gpus:
        torch.cuda.set_device(local)
        torch.cuda.init()  # type: ignore[no-untyped-call]
    server = TCPStore(
        os.environ["MASTER_ADDR"], values["MASTER_PORT"], size, rank == 0 and not of_agent, timeout=PATIENCE
    )
    store = PrefixStore(f"lorikit/{attempt}", server)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=torch.device("cuda", local) if gpus else None,
    )
    num_nodes, pulse = int(os.environ.get("GROUP_WORLD_SIZE", "1")), None
    if num_nodes > 1 and "GROUP_RANK" in os.environ:  # a launcher other than torchrun may not say which machine this is

        def connect() -> PrefixStore:
            place = os.environ["MASTER_ADDR"], values["MASTER_PORT"]
            return PrefixStore(f"lorikit/{attempt}", TCPStore(*place, size, False, _ANSWER, wait_for_workers=False))

        pulse = Pulse(connect, int(os.environ["GROUP_RANK"]), num_nodes, speaks=local == 0)
        pulse.start()
    return Ranks(rank, size, local, num_nodes, store, pulse)


def _end_as_one(ranks: Ranks, error: LorikitError) -> NoReturn:
    """Raise what this rank ends with. Who was only stopped, because another rank failed, ends for the reason of that one."""
    stopped, text = isinstance(error, Interrupted), str(error)
    if ranks.lost():  # the others, or the store, may be as silent
        if ranks.local_rank == 0 and not ranks.first:
            print(f"[rank {ranks.rank}] lorikit: {error}", file=sys.stderr)  # noqa: T201
        raise error if ranks.first else SystemExit(error.exit_code)
    ends: dict[int, dict[str, str]] = {}
    assert ranks.store is not None
    with suppress(RuntimeError):  # the store may be gone with its machine
        ranks.store.set(f"end/{ranks.rank}", json.dumps({"kind": type(error).__name__, "text": text}))
        deadline = time.monotonic() + _LAST_WORDS
        while len(ends) < ranks.size and time.monotonic() < deadline:
            time.sleep(0.02)
            for rank in set(range(ranks.size)) - ends.keys():
                if ranks.store.check([f"end/{rank}"]):
                    ends[rank] = json.loads(ranks.store.get(f"end/{rank}"))
    causes = [ends[rank]["kind"] for rank in sorted(ends) if ends[rank]["kind"] != Interrupted.__name__]
    if stopped and causes:
        raise SystemExit(getattr(errors, causes[0]).exit_code)
    if ranks.first:
        raise error
    if not stopped and (0 not in ends or ends[0]["text"] != text):
        print(f"[rank {ranks.rank}] lorikit: {error}", file=sys.stderr)  # noqa: T201  no other rank will say it
    raise SystemExit(error.exit_code)
