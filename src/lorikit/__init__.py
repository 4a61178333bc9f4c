"""Lorikit fine-tunes chat models with LoRA. The public names are imported on first use, so that this costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "RunConfig": "lorikit.config",
    "load_config": "lorikit.config",
    "LorikitError": "lorikit.errors",
}

__all__ = ["LorikitError", "RunConfig", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lorikit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
