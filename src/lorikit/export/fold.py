"""An adapter folded into the weights of its base, from file to file, one tensor in memory at a time (model/lora_fold.py).

The shards are safetensors files as transformers writes them: an 8-byte length, a JSON header with each tensor's type,
shape and place, then the bytes. Each tensor's size is known from the header of its base, so that a shard is written from
front to back and no shard is ever held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.model.lora_fold import FLOATS, Stored, Update
from lorikit.model_files import INDEX

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARD_BYTES = 5 * 10**9  # transformers' own limit of a shard


def cast(tensors: Sequence[Stored], dtype: str) -> list[Stored]:
    """The same tensors as they will be stored; `dtype` auto keeps each one's type, else it names that of all floats."""
    wanted = {value: key for key, value in FLOATS.items()}.get(dtype)
    return [replace(t, dtype=wanted) if wanted and t.dtype in FLOATS else t for t in tensors]


def write_shards(
    folder: Path,
    tensors: Sequence[Stored],
    updates: Mapping[str, Update],
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write the model's weights with the updates folded in; `done` hears after each tensor how many of all there are.

    One file model.safetensors, or shards of at most `shard_bytes` with their index. Raises OSError of a failing disk.
    """
    shards = _shards(cast(tensors, dtype), shard_bytes)
    single = len(shards) == 1
    files = [
        "model.safetensors" if single else f"model-{n:05}-of-{len(shards):05}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    written = 0
    for name, members in zip(files, shards, strict=True):
        with (folder / name).open("wb") as out:
            out.write(_header_bytes(members))
            for stored in members:
                out.write(_bytes(_computed(stored, updates.get(stored.name))))
                written += 1
                done(written, len(tensors))
    if not single:
        places = {t.name: name for name, members in zip(files, shards, strict=True) for t in members}
        total = sum(t.num_bytes for members in shards for t in members)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in files]


def _shards(tensors: Sequence[Stored], most: int) -> list[list[Stored]]:
    """In order, each of at most `most` bytes, but for a tensor that is larger alone."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        if shards[-1] and size + stored.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += stored.num_bytes
    return shards


def _header_bytes(tensors: Sequence[Stored]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for stored in tensors:
        end = start + stored.num_bytes
        header[stored.name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _computed(stored: Stored, update: Update | None) -> Tensor:
    """The tensor as it is to be stored."""
    import torch
    from safetensors import safe_open

    with safe_open(stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(stored.name)
    if update is not None:
        tensor = update.fold(tensor)
    wanted: torch.dtype = getattr(torch, FLOATS[stored.dtype]) if stored.dtype in FLOATS else tensor.dtype
    return tensor.to(wanted)


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
