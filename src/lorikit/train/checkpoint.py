"""Checkpoints: a folder with everything that a killed run needs to go on to the same bytes, and proof that it is whole.

checkpoint-N/ adapter_model.safetensors, adapter_config.json (PEFT's), optimizer.safetensors (exp_avg, exp_avg_sq, step of
each parameter), state.json, and manifest.json with size and sha256 of each file. Nothing is pickled. There is no random
state: rows and dropout of a step follow from the seed and its number (see optim.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lorikit.errors import ModelError
from lorikit.model.engine import Engine
from lorikit.train.adamw import MOMENTS, AdamW
from lorikit.train.storage import new_folder, remove_folder

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
_PART = 1 << 24  # bytes; a thread beside the steps waits for Python's lock, up to 5 ms, after each part that it hashes


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands after `step` optimizer steps; epoch, rows and learning rate follow from the number."""

    step: int = 0
    settled: bool = True
    """False: a signal came before the evaluation that this step ends with; the resumed run starts with it."""
    tokens: int = 0
    labelled_tokens: int = 0
    seconds: float = 0.0
    """Wall time of all processes that worked on the run."""
    window_loss: float = 0.0
    """Loss sum, labelled tokens, tokens and seconds of the steps since the last line of metrics.jsonl."""
    window_labelled: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    metrics_bytes: int = 0
    """Length of metrics.jsonl; what a killed process wrote after it is cut off."""
    best_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0
    """Evaluations since the best one."""
    max_tokens: int = 0
    """Tokens in one forward, as far as the memory has been found out."""
    data_sha256: str = ""
    base_revision: str | None = None


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return run / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """After how many steps a folder of this name was written; None where it is no checkpoint's."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number != folder.name and number.isdecimal() else None


def save(run: Path, moments: dict[str, Tensor], state: State, write_adapter: Callable[[Path], None]) -> Path:
    """Write checkpoint-N, whole or not at all; `moments` are the optimizer's state, `write_adapter` fills a folder with
    PEFT's two files.

    Raises DiskError; what was saved before is then still there.
    """
    from safetensors.torch import save_file

    folder = folder_of(run, state.step)
    with new_folder(folder) as staged:
        write_adapter(staged)
        save_file(moments, staged / OPTIMIZER)
        (staged / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        manifest = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in staged.iterdir()}
        (staged / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1) + "\n", encoding="utf-8")
    return folder


def all_finite(engine: Engine) -> bool:
    """Whether the adapter holds neither NaN nor infinity; a GPU is asked once."""
    import torch

    flat = engine.flat()
    parts = engine.parameters() if flat is None else [flat[0]]
    bounds = [bound for part in parts for bound in torch.aminmax(part.detach())]  # of NaN and anything they are NaN
    return bool(torch.stack(bounds).isfinite().all())


def load_adapter(folder: Path, engine: Engine) -> None:
    """Put the adapter of a checkpoint into the engine; ModelError if the checkpoint is damaged or does not fit."""
    from safetensors.torch import load_file

    problems = verify(folder)
    if problems:
        raise ModelError(
            f"{folder} is damaged: {'; '.join(problems)}; restore it, or delete it and all later ones to train from there"
        )
    engine.load_adapter_state(load_file(folder / ADAPTER))


def load(folder: Path, engine: Engine, optimizer: AdamW) -> State:
    """Put a whole checkpoint into the engine and the optimizer; ModelError if it is damaged or does not fit."""
    from safetensors.torch import load_file

    load_adapter(folder, engine)
    tensors = load_file(folder / OPTIMIZER)
    wanted = {f"{moment}.{name}" for name in engine.parameter_names() for moment in MOMENTS}
    if tensors.keys() - wanted:
        raise ModelError(f"{folder / OPTIMIZER}: no parameter for {', '.join(sorted(tensors.keys() - wanted))}")
    optimizer.load_state(tensors)
    return read_state(folder)


def read_state(folder: Path) -> State:
    """The state.json of a verified checkpoint; keys of a newer version are refused with a ModelError."""
    content = json.loads((folder / STATE).read_bytes())
    unknown = content.keys() - {field.name for field in fields(State)}
    if unknown:
        raise ModelError(f"{folder / STATE}: written by another version of lorikit ({', '.join(sorted(unknown))})")
    return State(**content)


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty if every byte is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        entries = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    problems = [f"{name} is not listed" for name in (ADAPTER, OPTIMIZER, STATE) if name not in entries]
    for name, (size, sha256) in entries.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif _sha256(path) != sha256:
            problems.append(f"{name} was changed after it was written (sha256)")
    return problems


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint-N folders, oldest first."""
    return sorted(
        (path for path in run.glob("checkpoint-*") if path.name[11:].isdecimal()), key=lambda path: int(path.name[11:])
    )


def newest(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None if there are none.

    Damaged ones are passed over, each with its reason, and set aside as damaged-checkpoint-N. Raises ModelError when
    there are only damaged ones: starting over has to be somebody's decision.
    """
    damaged: list[Path] = []
    for folder in reversed(checkpoints(run)):
        problems = verify(folder)
        if not problems:
            for bad in damaged:
                remains = bad.with_name(f"damaged-{bad.name}")
                if remains.exists():
                    remove_folder(remains)
                bad.rename(remains)
            return folder
        damaged.append(folder)
        say(f"passed over {folder}: {'; '.join(problems)}")
    if damaged:
        raise ModelError(
            f"{run}: none of its {len(damaged)} checkpoints is whole (last: {'; '.join(verify(damaged[0]))}); restore "
            "one, or delete them to start over"
        )
    return None


def prune(run: Path, limit: int | None, keep: Sequence[int | None]) -> None:
    """Delete all but the newest `limit` checkpoints (None: keep all) and those of the steps in `keep`."""
    for folder in checkpoints(run)[: -limit if limit else 0]:
        if int(folder.name[11:]) not in keep:
            remove_folder(folder)


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(_PART, path.stat().st_size) or 1)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()
