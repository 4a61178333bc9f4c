"""A run, an adapter, a checkpoint or a base model -> a Session: engine and encoder as they were in training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorikit.config import RunConfig, load_config
from lorikit.data.encode import Encoder
from lorikit.errors import ConfigError, ModelError
from lorikit.hub import Resolved, resolve_model
from lorikit.model import lora
from lorikit.model.engine import Engine
from lorikit.model.load import load_engine, load_tokenizer, stop_ids

CONFIG, ADAPTER, CHECKPOINT = "config.yaml", "adapter", "checkpoint-"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # by the age of the model
_NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class Session:
    """What it takes to get answers. `base` is the name of the base model, `max_length` its longest sequence in tokens;
    `notes` say in plain words what was found otherwise than expected."""

    engine: Engine
    encoder: Encoder
    config: RunConfig
    name: str
    base: str
    max_length: int
    has_adapter: bool
    merged: bool = False
    """Whether the adapter is folded into the base, which is then not there alone."""
    adapter: Path | None = None
    """The folder that the adapter came from: of an unfinished run its newest whole checkpoint."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Located:
    """What a name stands for, before anything large is loaded: settings (device and type as asked), the base's folder,
    the adapter's folder and the folder of the tokenizer."""

    config: RunConfig
    base: Resolved
    adapter: Path | None
    tokenizer: Path
    notes: tuple[str, ...] = ()

    def encoder(self) -> Encoder:
        """The one that the run was trained with."""
        tokenizer = load_tokenizer(self.tokenizer, trust_remote_code=self.config.model.trust_remote_code)
        return Encoder(tokenizer, self.config.data, stop_ids(self.base.path))


@dataclass(frozen=True, slots=True)
class _Found:
    config: RunConfig
    origin: str = ""  # of the base's name
    adapter: Path | None = None
    tokenizer: Path | None = None  # None: the base's own
    notes: tuple[str, ...] = ()


def open_run(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    need_adapter: bool = True,
    merge: bool = False,
) -> Session:
    """The session of a run folder, a checkpoint of one, or a PEFT adapter folder.

    A run's own settings say how text becomes tokens; `device` and `dtype` other than auto replace the run's. A run that
    is not finished answers from its newest whole checkpoint. With `need_adapter` False it is the base alone, in the
    settings of the run, and `path` may also be the folder or the id of a base model. With `merge` the adapter is folded
    into the base in memory, ConfigError where that is not possible. Raises ModelError that says what to
    do where there is no adapter, and whatever loading the base, its adapter and its template raises.
    """
    if merge and not need_adapter:
        raise ConfigError("--merge and --base: merge the adapter, or answer without it")
    located = locate(path, device=device, dtype=dtype, need_adapter=need_adapter)
    encoder = located.encoder()
    return Session(
        engine=load_engine(located.config.model, located.base, adapter=located.adapter, merge=merge),
        encoder=encoder,
        config=located.config,
        name=str(path),
        base=located.base.name,
        max_length=longest(located.base.path),
        has_adapter=located.adapter is not None and not merge,
        merged=merge,
        adapter=located.adapter,
        notes=(*located.notes, *encoder.notes),
    )


def locate(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    need_adapter: bool = True,
) -> Located:
    """What `open_run` would load, with the same arguments and errors; the base is downloaded if need be."""
    found = _find(str(path), need_adapter)
    settings = found.config.model
    revision = settings.revision
    if revision is None and found.adapter and not Path(settings.name_or_path).exists():
        revision = lora.read_config(found.adapter).get("revision")  # the commit that it was trained on
    overrides: dict[str, object] = {} if dtype == "auto" else {"dtype": dtype}
    if device != "auto":
        overrides |= {"device": device, "device_map": None}
    try:
        base = resolve_model(settings.name_or_path, revision, settings.hub)
    except ModelError as error:
        what = "neither a folder nor a model" if settings.name_or_path == str(path) else f"no base ({found.origin})"
        raise ModelError(f"{path}: {what}: {error}") from None
    return Located(
        config=found.config.model_copy(update={"model": settings.model_copy(update=overrides)}),
        base=base,
        adapter=found.adapter if need_adapter else None,
        tokenizer=found.tokenizer or base.path,
        notes=found.notes,
    )


def _find(path: str, need_adapter: bool) -> _Found:
    """Which adapter, if any, and which settings `path` stands for."""
    folder = Path(path)
    if (folder / CONFIG).is_file():
        return _find_in_run(folder, need_adapter)
    if (folder / lora.CONFIG).is_file():
        is_checkpoint = folder.name.startswith(CHECKPOINT)
        if (folder.parent / CONFIG).is_file() and (is_checkpoint or folder.name == ADAPTER):
            damage = _damage(folder) if is_checkpoint else None
            if damage:
                raise ModelError(f"{folder}: {damage}; take another checkpoint")
            return _Found(load_config(folder.parent / CONFIG), f"model in {folder.parent / CONFIG}", folder)
        base, origin = lora.read_config(folder).get("base_model_name_or_path"), folder / lora.CONFIG
        if not base:
            raise ModelError(f"{origin}: base_model_name_or_path is empty; write there which model it was trained on")
        own = folder if (folder / "tokenizer_config.json").is_file() else None
        return _Found(_default_settings(base), f"base_model_name_or_path in {origin}", folder, own)
    is_model = (folder / "config.json").is_file()
    if not need_adapter and (is_model or not folder.exists()):
        return _Found(_default_settings(path))
    what = "no such folder" if not folder.exists() else "this is a base model" if is_model else "this is neither"
    raise ModelError(
        f"{folder}: {what}; a run folder holds {CONFIG}, the folder of an adapter {lora.CONFIG}"
        + ("" if not need_adapter else ", and with --base the name of a base model will do")
    )


def _find_in_run(run: Path, need_adapter: bool) -> _Found:
    config, origin = load_config(run / CONFIG), f"model in {run / CONFIG}"
    if (run / ADAPTER).is_dir():
        return _Found(config, origin, run / ADAPTER)
    notes: list[str] = []
    checkpoints = [p for p in run.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdecimal()]
    for folder in sorted(checkpoints, key=lambda p: -int(p.name.removeprefix(CHECKPOINT))):
        damage = _damage(folder)
        if damage is None:
            notes.append(f"{run} is not finished: this is its {folder.name}")
            return _Found(config, origin, folder, notes=tuple(notes) if need_adapter else ())
        notes.append(f"passed over {folder}: {damage}")
    if need_adapter:
        notes.append(
            f"{run}: no {ADAPTER}/ yet and no {'whole ' if notes else ''}checkpoint; give the command that trains it "
            "once more, or add --base to talk to the base"
        )
        raise ModelError("\n".join(notes))
    return _Found(config, origin)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the adapter of a checkpoint, by the sha256 of its manifest."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
        for name in (lora.CONFIG, lora.WEIGHTS):
            if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != files[name]["sha256"]:
                return f"{name} is not as it was written (sha256)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be verified ({type(error).__name__}: {error})"
    return None


def _default_settings(base: str) -> RunConfig:
    return load_config(model={"name_or_path": base}, data={"train": "none"}, train={"output_dir": "none"})


def longest(model: Path) -> int:
    """The longest sequence of a model, in tokens, by its config.json."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{model / 'config.json'}: cannot be read ({error})") from None
    for values in (config, config.get("text_config") or {}):
        for name in _POSITIONS:
            if isinstance(values.get(name), int):
                return int(values[name])
    return _NO_LIMIT
