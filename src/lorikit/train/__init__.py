"""Training. The package is callable: `lorikit.train(config)` is `lorikit.train.loop.train(config)`.

Python binds a package's name in its parent on import, so a function of this name would be replaced by the package the
first time anything of it is imported; a module whose class is set (Python's data model, "Customizing module attribute
access") is both.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorikit.config import RunConfig
    from lorikit.train.progress import Report


class _Callable(ModuleType):
    def __call__(self, config: RunConfig, *, report: Report | None = None) -> Path:
        """Train one adapter; the same call on a run that was cut off goes on with it. Returns the run folder.

        `report` is told of every step; in a notebook it is by default a live curve, elsewhere a progress line. Raises
        ConfigError, DataError, ModelError, DivergedError, OutOfMemoryError, DiskError, and Interrupted after a signal.
        """
        from lorikit.train.loop import train
        from lorikit.train.notebook import choose_report

        return train(config, report=report or choose_report())


sys.modules[__name__].__class__ = _Callable
