"""Which models one server answers for: the base, and each run as an adapter on it, with the encoder of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorikit.errors import ConfigError, ModelError
from lorikit.infer.session import Located, locate, longest
from lorikit.model.load import load_engine
from lorikit.train.card import public_name

if TYPE_CHECKING:
    from lorikit.data.encode import Encoder
    from lorikit.model.engine import Engine


@dataclass(frozen=True, slots=True)
class Served:
    """One model as clients name it. `adapter` is the engine's name of it, None for the base; `run` what was given and
    `folder` the adapter that it stood for when the server started."""

    name: str
    adapter: str | None
    encoder: Encoder
    run: str
    folder: Path | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Models:
    """All that one engine answers for; the first one is what a client gets that names none."""

    engine: Engine
    served: dict[str, Served]
    max_length: int

    @property
    def first(self) -> Served:
        """The first run that was named."""
        return next(iter(self.served.values()))


def place_runs(runs: Sequence[str], device: str = "auto") -> dict[str, Located]:
    """What each RUN or NAME=RUN stands for, by the name that clients use; nothing large is loaded.

    ConfigError for names that are taken twice; ModelError for runs on different bases.
    """
    placed: dict[str, Located] = {}
    for run in runs:
        name, path = name_of(run)
        if name in placed:
            raise ConfigError(f"two runs are called {name!r}: give one of them a name, as in NAME={path}")
        placed[name] = locate(path, device=device)
    bases = {located.base.path.resolve(): located.base.name for located in placed.values()}
    if len(bases) > 1:
        raise ModelError(
            f"one server has one base, and these runs have {len(bases)}: {', '.join(bases.values())}; start one for each"
        )
    return placed


def name_of(run: str) -> tuple[str, str]:
    """NAME=RUN, or RUN, whose name is its folder's (for adapter/ and checkpoint-N with the run's name before it)."""
    name, mark, path = run.partition("=")
    if mark and name and not Path(run).exists():
        return name, path
    folder = Path(run).absolute()
    inside = folder.name == "adapter" or folder.name.startswith("checkpoint-")
    return (
        folder.parent.name
        if folder.name == "adapter"
        else f"{folder.parent.name}-{folder.name}"
        if inside
        else folder.name
    ), run


def open_models(runs: Sequence[str], device: str = "auto", *, merge: bool = False) -> Models:
    """Load the base once and every run's adapter beside it. Raises what `place_runs` and loading raise.

    `merge`: the adapter of the only run is folded into the base, which is then no model of its own.
    """
    if merge and len(runs) > 1:
        raise ConfigError(f"--merge takes one run, and there are {len(runs)}: serve them unmerged, side by side")
    placed = place_runs(runs, device)
    if merge:
        return _open_merged(runs[0], placed)
    paths = {name_of(run)[0]: name_of(run)[1] for run in runs}
    first = next(iter(placed.values()))
    engine = load_engine(first.config.model, first.base, adapter=first.adapter)
    served: dict[str, Served] = {}
    for number, (name, located) in enumerate(placed.items()):
        encoder = located.encoder()
        # A run may have any name, also that of the first one's adapter.
        adapter = engine.adapter_names()[0] if located is first else f"run {number}"
        if located is not first:
            assert located.adapter is not None
            engine.add_adapter(adapter, located.adapter)
        served[name] = Served(name, adapter, encoder, paths[name], located.adapter, (*located.notes, *encoder.notes))
    base = public_name(first.base.name)
    if base in served:
        base += "-base"
    plain = next(iter(served.values())).encoder
    served[base] = Served(base, None, plain, first.base.name, None)
    return Models(engine, served, longest(first.base.path))


def _open_merged(run: str, placed: Mapping[str, Located]) -> Models:
    [(name, located)] = placed.items()
    engine = load_engine(located.config.model, located.base, adapter=located.adapter, merge=True)
    encoder = located.encoder()
    served = Served(name, None, encoder, name_of(run)[1], located.adapter, (*located.notes, *encoder.notes))
    return Models(engine, {name: served}, longest(located.base.path))
