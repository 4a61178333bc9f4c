"""From settings to an adapter, in numbered steps; the loop itself is in training.py."""

from __future__ import annotations

from pathlib import Path

from lorikit.config import RunConfig
from lorikit.data.audit import prepare
from lorikit.data.encode import Encoder
from lorikit.hub import resolve_model
from lorikit.model.load import load_engine, load_tokenizer, stop_ids
from lorikit.train.metrics import check_trackers
from lorikit.train.progress import Report
from lorikit.train.run_folder import ADAPTER_FOLDER, is_finished, open_run
from lorikit.train.signals import Signals
from lorikit.train.training import Training


def train(config: RunConfig, *, report: Report | None = None) -> Path:
    """Train one adapter; the same call on a run that was cut off goes on with it. Returns the run folder.

    Raises ConfigError, DataError, ModelError, DivergedError, OutOfMemoryError, DiskError, and Interrupted after a signal.
    """
    report = report or Report()
    with Signals() as signals, open_run(config) as run:
        # 1. Is there anything to do?
        if is_finished(run):
            report.say(f"{run} is finished; its adapter is {run / ADAPTER_FOLDER}")
            return run
        check_trackers(config.train.report_to)

        # 2. Names become folders on this machine.
        base = resolve_model(config.model.name_or_path, config.model.revision, config.model.hub)
        signals.check()

        # 3. Rows become tokens, each accounted for.
        tokenizer = load_tokenizer(base.path, trust_remote_code=config.model.trust_remote_code)
        encoder = Encoder(tokenizer, config.data, stop_ids(base.path))
        prepared = prepare(config, encoder)
        signals.check()

        # 4. The base and its new adapter.
        engine = load_engine(
            config.model,
            base,
            new_adapter=config.lora,
            seed=config.train.seed,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )
        signals.check()

        # 5. The loop, from the newest checkpoint if there is one.
        Training(
            config,
            run,
            engine,
            prepared.train,
            held_out=prepared.held_out,
            encoder=encoder,
            report=report,
            signals=signals,
            base_name=base.name,
            base_revision=base.revision,
        ).run()
    return run
