"""Counting what torch really holds: bytes of live storages, and the worst moment, while a block of code runs.

On the meta device the same counts come without memory or arithmetic, so that a model can be measured before it is loaded.
What an operation allocates inside itself and frees again is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Seen = Callable[[Any, tuple[Any, ...], Any], None]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it every storage that an operation makes is counted until it is freed.

    `total` and `peak` in bytes, from 0 at the beginning; storages that were there before do not count. `seen` is called
    with each operation, its arguments and its result.
    """

    def __init__(self, seen: Seen | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.peak = 0
        self._seen = seen
        self._known: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what is new in its result."""
        old = {s._cdata for s in map(_storage, tree_iter((args, kwargs))) if s is not None}
        out = func(*args, **(kwargs or {}))
        for item in tree_iter(out):
            storage = _storage(item)
            if storage is not None and storage._cdata not in old:
                self._count(storage)
        if self._seen:
            self._seen(func, args, out)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key].alive:
            return
        self.total += size
        self.peak = max(self.peak, self.total)
        self._known[key] = weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.total -= size
        self._known.pop(key, None)


def _storage(item: Any) -> torch.UntypedStorage | None:
    return item.untyped_storage() if isinstance(item, Tensor) and item.layout == torch.strided else None
