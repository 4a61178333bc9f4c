"""From settings to an adapter, in numbered steps; the loop itself is in training.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorikit.config import RunConfig
from lorikit.data.account import DataReport
from lorikit.data.audit import prepare
from lorikit.data.encode import Encoder
from lorikit.data.view import visible
from lorikit.hub import Resolved, resolve_data, resolve_model
from lorikit.model.load import load_engine, load_tokenizer, stop_ids
from lorikit.train.metrics import check_trackers, peak_memory
from lorikit.train.plan import one_line
from lorikit.train.plan_costs import choose_target, costs_of
from lorikit.train.predict import predict
from lorikit.train.progress import Report
from lorikit.train.run_folder import (
    ADAPTER_FOLDER,
    is_finished,
    measured,
    open_run,
    write_data_report,
    write_environment,
)
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
        base = resolve_model(config.model.name_or_path, config.model.revision, config.model.hub, report.say)
        signals.check()
        paths = _find_data(config, config.data.train, report)
        held_out_paths = _find_data(config, config.eval.data, report) if config.eval.data else None
        signals.check()

        # 3. Rows become tokens, each accounted for.
        tokenizer = load_tokenizer(base.path, trust_remote_code=config.model.trust_remote_code)
        encoder = Encoder(tokenizer, config.data, stop_ids(base.path))
        prepared = prepare(paths, held_out_paths, config, encoder)
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

        # 5. The newest checkpoint, if the run was cut off.
        training = Training(
            config,
            run,
            engine,
            prepared.train,
            held_out=prepared.held_out,
            encoder=encoder,
            report=report,
            signals=signals,
            base_name=base.path.resolve().name if base.hub == "path" else base.name,  # it gets published
            base_revision=base.revision,
        )
        training.restore()
        write_data_report(run, prepared.report)
        _summarise(training, prepared.report)
        predicted = _predict(training, base)
        signals.check()

        # 6. The loop, and what it took.
        training.run()
        peak = {"peak_memory_bytes": peak_memory(engine.device)}
        write_environment(run, predicted=predicted, measured=measured(run) | peak)
    return run


def _predict(training: Training, base: Resolved) -> dict[str, Any] | None:
    """Memory and time, said in a line and noted in environment.json, so that the run can be held to them."""
    config = training.config
    try:
        target = choose_target(config.model, None, None, seconds=0.2)
        predicted = predict(
            config,
            training.base_name,
            costs_of(config, base, target),
            target,
            training.rows,
            training.held_out,
            max_tokens=training.budget.max_tokens,
            loaded=True,
        )
    except Exception as error:  # a wrong prediction, or none, is no reason to stop a training
        training.report.say(f"plan: memory and time could not be predicted ({type(error).__name__}: {error})")
        return None
    training.report.say(one_line(predicted))
    values = predicted.to_dict()
    write_environment(training.run_folder, predicted=values)
    return values


def _find_data(config: RunConfig, names: str | list[str], report: Report) -> list[Path]:
    names = [names] if isinstance(names, str) else names
    return [resolve_data(name, hub=config.model.hub, report=report.say).path for name in names]


def _summarise(training: Training, rows: DataReport) -> None:
    """Say what is about to happen, in a few lines."""
    engine, plan, say = training.engine, training.plan, training.report.say
    for note in rows.notes:
        say(note)
    say(
        f"{rows.num_rows} rows read: {rows.num_trained} to train, {len(rows.held_out)} held out, {rows.num_dropped} dropped, "
        f"{len(rows.duplicates)} duplicates removed (data_report.json names them)"
    )
    told = [one for one in rows.findings if one.severity != "note"]
    for one in told:
        say(visible(f"{one.severity}: {one.headline}, first {one.places[0]}"))
    if told:
        say("`lorikit check` shows more of these rows and what to do, data_report.json has them all")
    trainable = sum(parameter.numel() for parameter in engine.parameters())
    why = f" (not the decoder: {engine.choice})" if engine.choice else ""
    bits = training.config.model.quantization
    base = training.base_name + (f", linear layers in {bits}," if bits != "none" else "")
    say(f"{base} on {engine.device}, engine {engine.name}{why}, {trainable:,} trainable parameters")
    say(f"{plan.num_steps} steps of {plan.rows_per_step} rows, {plan.steps_per_epoch} an epoch")
