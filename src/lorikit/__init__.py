"""Lorikit fine-tunes chat models with LoRA. The public names are imported on first use, so that this costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Type checkers read the same names from __init__.pyi.
_HOME = {
    "Answer": "lorikit.infer.generate",
    "ConfigError": "lorikit.errors",
    "DataError": "lorikit.errors",
    "LorikitError": "lorikit.errors",
    "Message": "lorikit.data.values",
    "ModelError": "lorikit.errors",
    "RunConfig": "lorikit.config",
    "Sampling": "lorikit.model.engine",
    "Session": "lorikit.infer.session",
    "chat": "lorikit.api",
    "check": "lorikit.api",
    "compare": "lorikit.report.compare",
    "generate": "lorikit.api",
    "load_config": "lorikit.config",
    "merge": "lorikit.export.merge",
    "open_run": "lorikit.infer.session",
    "plan": "lorikit.train.plan",
    "stream": "lorikit.api",
}

__all__ = [
    "Answer",
    "ConfigError",
    "DataError",
    "LorikitError",
    "Message",
    "ModelError",
    "RunConfig",
    "Sampling",
    "Session",
    "__version__",
    "chat",
    "check",
    "compare",
    "generate",
    "load_config",
    "merge",
    "open_run",
    "plan",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # the package, which is callable
        return import_module("lorikit.train")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lorikit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
