"""`lorikit plan`: memory and time of a run before anything is loaded, and of a run folder beside what was measured.

Of the model config.json and the headers of safetensors are read, of the data every row, by the token path of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorikit.config import RunConfig, load_config
from lorikit.data.audit import Prepared, prepare
from lorikit.data.encode import Encoder
from lorikit.errors import ConfigError
from lorikit.hub import Resolved, resolve_data, resolve_model
from lorikit.model.load import load_tokenizer, stop_ids
from lorikit.model.sharded import is_sharded
from lorikit.train.advice import advice, gib, longest_row, seconds
from lorikit.train.network import count_ranks, layers_of, links_of, on_ranks, sharded_costs, spread
from lorikit.train.plan_costs import choose_target, costs_of
from lorikit.train.predict import Prediction, memory_of, predict
from lorikit.train.run_folder import CONFIG, ENVIRONMENT, is_finished, measured

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Compared:
    """A run folder: what was predicted as it began, and what it took so far. Both as in environment.json."""

    run: str
    finished: bool
    predicted: dict[str, Any]
    measured: dict[str, Any]
    can_run: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"run": self.run, "finished": self.finished, "predicted": self.predicted, "measured": self.measured}


def plan(
    config: RunConfig,
    gpu: str | None = None,
    memory_gib: float | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
) -> Prediction:
    """What this run will need on the GPU named, on one with `memory_gib`, or on this machine's device; on `gpus` of them in
    each of `nodes` machines.

    `progress` is told rows done and rows in all. Raises what `train` raises for settings, data and model, and ConfigError
    for a GPU that is not known.
    """
    target = choose_target(config.model, gpu, memory_gib)
    base = resolve_model(config.model.name_or_path, config.model.revision, config.model.hub, say)
    costs = costs_of(config, base, target)
    prepared = _prepare(config, base, say, progress)
    ranks, nodes = count_ranks(gpus, nodes)
    shared = gpus is not None or nodes > 1 or is_sharded(config.model)
    layers = layers_of(base.path, costs.base_parameters, target.dtype.itemsize)
    alone = predict(config, base.name, costs, target, prepared.train, prepared.held_out)
    costs = sharded_costs(costs, config.model, layers, ranks)
    predicted = alone
    if shared:
        part = predict(config, base.name, costs, target, prepared.train, prepared.held_out, ranks=ranks)
        links, cpu = links_of(target, ranks, nodes), target.kind == "cpu"
        predicted = on_ranks(part, spread(alone, part, config.model, layers, links, nodes, shared_cpu=cpu))
    if predicted.fits is False:
        longest = costs.sizes([longest_row(prepared.train)])
        predicted = replace(predicted, alone=memory_of(costs, target, [longest], []).needed)
    words = [] if shared else advice(config, base, target, costs, predicted, prepared.train, prepared.held_out)
    return replace(predicted, advice=words, notes=[*prepared.report.notes, *predicted.notes])


def compare(run: Path, *, asked: bool = False) -> Compared:
    """What a run folder's environment.json and metrics.jsonl say. ConfigError for a folder that is no run, or one that was
    trained without a prediction; and when settings or another machine were `asked` for, which a run has already."""
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is a folder without {CONFIG}; give the YAML file of a run, or a run folder")
    if asked:
        raise ConfigError(f"{run} is a run folder, whose settings are fixed; to plan anew give {run / CONFIG}")
    load_config(run / CONFIG)
    environment: Any = {}
    with suppress(OSError, ValueError):
        environment = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    predicted = environment.get("predicted") if isinstance(environment, dict) else None
    if not isinstance(predicted, dict):
        raise ConfigError(
            f"{run}: its {ENVIRONMENT} holds no prediction, as of a run by an older version; "
            f"for a new one: lorikit plan {run / CONFIG}"
        )
    return Compared(str(run), is_finished(run), predicted, environment.get("measured") or measured(run))


def one_line(predicted: Prediction) -> str:
    """For the screen of `train`: what the run will take."""
    memory, time = predicted.memory, predicted.time
    need = "memory not predicted"
    if memory:
        of = f" of {gib(predicted.capacity)}" if predicted.capacity else ""
        need = f"at most {gib(memory.needed)}{of}, {'which does not fit' if predicted.fits is False else 'predicted'}"
    speed = ""
    if time:
        speed = f"; {seconds(time.step)} a step, {time.tokens_per_second:,.0f} tokens/s, {seconds(time.total)} in all"
    return f"plan: {need}{speed}"


def _prepare(config: RunConfig, base: Resolved, say: Say | None, progress: Progress | None) -> Prepared:
    def find(names: str | list[str]) -> list[Path]:
        names = [names] if isinstance(names, str) else names
        return [resolve_data(name, hub=config.model.hub, report=say).path for name in names]

    paths = find(config.data.train)
    eval_paths = find(config.eval.data) if config.eval.data else None
    tokenizer = load_tokenizer(base.path, trust_remote_code=config.model.trust_remote_code)
    encoder = Encoder(tokenizer, config.data, stop_ids(base.path))
    return prepare(paths, eval_paths, config, encoder, progress=progress)
