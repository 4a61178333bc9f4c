"""From settings to an adapter, in numbered steps; the loop itself is in training.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorikit.config import RunConfig
from lorikit.data.account import DataReport
from lorikit.data.audit import prepare
from lorikit.data.encode import Encoder
from lorikit.data.view import visible
from lorikit.errors import ConfigError
from lorikit.hub import Resolved, resolve_data, resolve_model
from lorikit.model.engine import Engine
from lorikit.model.load import load_engine, load_tokenizer, stop_ids
from lorikit.train.distributed import Ranks
from lorikit.train.join import join
from lorikit.train.metrics import check_trackers, peak_memory
from lorikit.train.network import layers_of, links_of, on_ranks, sharded_costs, spread
from lorikit.train.plan import one_line
from lorikit.train.plan_costs import choose_target, costs_of
from lorikit.train.predict import predict
from lorikit.train.progress import Report, silent
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
    with Signals() as signals, join(signals) as ranks, open_run_of(config, ranks) as run:
        report = (report or Report()) if ranks.first else silent()
        # 1. Is there anything to do?
        if ranks.text(is_finished(run)):
            report.say(f"{run} is finished; its adapter is {run / ADAPTER_FOLDER}")
            return run
        if ranks.first:
            check_trackers(config.train.report_to)

        # 2. Names become folders on this machine.
        with ranks.first_on_each_node():
            base = resolve_model(config.model.name_or_path, config.model.revision, config.model.hub, report.say)
            signals.check()
            paths, held_out_paths = _find_data(config, report)
        signals.check()

        # 3. Rows become tokens, each accounted for.
        tokenizer = load_tokenizer(base.path, trust_remote_code=config.model.trust_remote_code)
        encoder = Encoder(tokenizer, config.data, stop_ids(base.path))
        prepared = prepare(paths, held_out_paths, config, encoder)
        signals.check()

        # 4. The base and its new adapter.
        engine = _load_engine(config, base)
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
            ranks=ranks,
        )
        training.restore()
        if training.writes:
            write_data_report(run, prepared.report)
        _summarise(training, prepared.report)
        predicted = _predict(training, base) if ranks.first else None
        signals.check()

        # 6. The loop, and what it took.
        training.run()
        if ranks.first:
            peak = max(peak_memory(engine.device), training.peak_memory)
            write_environment(run, predicted=predicted, measured=measured(run) | {"peak_memory_bytes": peak})
    return run


@contextmanager
def open_run_of(config: RunConfig, ranks: Ranks) -> Iterator[Path]:
    """The run folder, made and locked by the ranks that write it; the others are told its name alone."""
    if not ranks.first and not (config.train.save_on_each_node and ranks.local_rank == 0):
        yield Path(config.train.output_dir)
        return
    with ExitStack() as stack:
        try:
            run = stack.enter_context(open_run(config))
        except ConfigError as error:
            if not ranks.first and "in use" in str(error):
                raise ConfigError(
                    f"{config.train.output_dir} is one folder for several machines: set train.save_on_each_node: false, or "
                    "name a train.output_dir on each machine's own disk"
                ) from None
            raise
        yield run


def _load_engine(config: RunConfig, base: Resolved) -> Engine:
    train = config.train
    return load_engine(
        config.model,
        base,
        new_adapter=config.lora,
        seed=train.seed,
        gradient_checkpointing=train.gradient_checkpointing,
    )


def _predict(training: Training, base: Resolved) -> dict[str, Any] | None:
    """Memory and time, said in a line and noted in environment.json, so that the run can be held to them."""
    config = training.config
    try:
        target, ranks = choose_target(config.model, None, None, seconds=0.2), training.ranks.size
        costs = costs_of(config, base, target)
        layers = layers_of(base.path, costs.base_parameters, target.dtype.itemsize)
        predicted = predict(
            config,
            training.base_name,
            sharded_costs(costs, config.model, layers, ranks),
            target,
            training.rows,
            training.held_out,
            max_tokens=training.budget.max_tokens,
            loaded=True,
            ranks=ranks,
        )
        if training.ranks.active:
            links, nodes = links_of(target, ranks, training.ranks.num_nodes), training.ranks.num_nodes
            cpu = target.kind == "cpu"
            found = spread(predicted, predicted, config.model, layers, links, nodes, shared_cpu=cpu)
            predicted = on_ranks(predicted, replace(found, efficiency=None))
    except Exception as error:  # a wrong prediction, or none, is no reason to stop a training
        training.report.say(f"plan: memory and time could not be predicted ({type(error).__name__}: {error})")
        return None
    training.report.say(one_line(predicted))
    values = predicted.to_dict()
    write_environment(training.run_folder, predicted=values)
    return values


def _find_data(config: RunConfig, report: Report) -> tuple[list[Path], list[Path] | None]:
    """Files of the training rows, and of the held-out ones where they have their own."""

    def find(names: str | list[str]) -> list[Path]:
        names = [names] if isinstance(names, str) else names
        return [resolve_data(name, hub=config.model.hub, report=report.say).path for name in names]

    return find(config.data.train), find(config.eval.data) if config.eval.data else None


def _summarise(training: Training, rows: DataReport) -> None:
    """Say what is about to happen, in a few lines."""
    if not training.ranks.first:
        return
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
    ranks = training.ranks
    if ranks.size > 1:
        machines = f" on {ranks.num_nodes} machines" if ranks.num_nodes > 1 else ""
        few = "; some have none, take more rows a step" if plan.rows_per_step < ranks.size else ""
        say(f"{ranks.size} processes{machines} share the rows of each step{few}")
