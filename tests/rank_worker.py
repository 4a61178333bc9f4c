"""What torchrun starts in test_distributed.py: one rank of a run of the tiny engine, with an accident if one is asked for.

torchrun ... rank_worker.py RUN ACCIDENT [JSON of settings]
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from lorikit.errors import LorikitError
from lorikit.train.join import join
from lorikit.train.progress import Report, silent
from lorikit.train.signals import Signals
from lorikit.train.training import Training
from test_loop import HELD_OUT, ROWS, settings
from tiny_engine import TinyEngine


class Accident(TinyEngine):
    """On rank 1, in its forward number 7: a signal, memory that runs out for more than one row, a loss that is no number.

    "slow" is a wait in every forward of every rank.
    """

    def __init__(self, kind, rank, dropout):
        super().__init__(dropout=dropout)
        self.kind, self.rank, self.forwards = kind, rank, 0

    def loss_sum(self, batch):
        self.forwards += 1
        here = self.rank == 1 and self.forwards >= 7
        if here and self.forwards == 7 and self.kind in ("SIGTERM", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        if here and self.kind == "SIGKILL once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and (self.kind == "no memory" or (self.kind == "little memory" and len(batch.cu_seqlens) > 2)):
            raise RuntimeError("can't allocate memory")
        if self.kind == "slow":
            time.sleep(0.5)
        loss = super().loss_sum(batch)
        return loss * math.nan if here and self.kind == "NaN" else loss


def main():
    run, kind, more = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    dropout = more.pop("dropout", 0.0)
    try:
        with Signals() as signals, join(signals) as ranks:
            report = Report(Console(file=sys.stderr, width=200)) if ranks.first else silent()
            run.mkdir(exist_ok=True)
            training = Training(
                settings(run, **more),
                run,
                Accident(kind, ranks.rank, dropout),
                ROWS,
                held_out=HELD_OUT,
                report=report,
                signals=signals,
                ranks=ranks,
            )
            training.restore()
            training.run()
    except LorikitError as error:
        print(f"lorikit: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
