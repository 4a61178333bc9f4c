"""The form of a run, made from the settings model: the few that matter first, every other one under its group."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import streamlit as st
import yaml

from lorikit.config import RunConfig, load_config, setting_names
from lorikit.web.frame import Frame
from lorikit.web.texts import SETTINGS

OWN = ("model.name_or_path", "data.train", "train.output_dir")
"""Settings that have a field of their own on the page."""


def first_fields(frame: Frame) -> dict[str, str]:
    """Draw the settings that matter first, with their defaults filled in; what was entered, by name."""
    entered = {}
    for name, cell in zip(SETTINGS, _cells(len(SETTINGS), 3), strict=False):
        with cell:
            entered[name] = st.text_input(
                frame.setting(name), _shown(_default(name)), help=_help(name), key=f"set {name}"
            )
    return entered


def other_fields() -> dict[str, str]:
    """Draw all others, a tab for each group; what was entered, by name, empty for the default."""
    entered = {}
    for tab, group in zip(st.tabs(list(RunConfig.model_fields)), RunConfig.model_fields, strict=True):
        with tab:
            names = [n for n in setting_names() if n.startswith(f"{group}.") and n not in OWN and n not in SETTINGS]
            for name, cell in zip(names, _cells(len(names), 2), strict=False):
                with cell:
                    entered[name] = _field(name)
    return entered


def settings_of(entered: dict[str, str]) -> tuple[RunConfig, dict[str, Any]]:
    """The run that was entered, and of it what differs from the defaults, for a YAML file.

    Raises ConfigError with every value that is not allowed.
    """
    flags = [f"--{name}={text.strip()}" for name, text in entered.items() if text.strip()]
    config = load_config(flags=flags)
    groups: dict[str, Any] = {}
    for group, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            field = _info(f"{group}.{name}")
            if field.is_required() or value != field.get_default(call_default_factory=True):
                groups.setdefault(group, {})[name] = value
    return config, groups


def _cells(count: int, columns: int) -> Iterator[Any]:
    """Places for fields, row by row, so that they keep their order where a phone stacks the columns."""
    for _ in range(0, count, columns):
        yield from st.columns(columns)


def _field(name: str) -> str:
    label, key = name.partition(".")[2], f"set {name}"
    choices = _choices(name)
    default = _shown(_default(name))
    if len(choices) == 1:
        st.text_input(label, default, help=_help(name), key=key, disabled=True)
        return ""
    if choices:
        at = choices.index(default) if default in choices else None
        picked = st.selectbox(label, choices, index=at, help=_help(name), key=key)
        return "" if picked in (None, default) else str(picked)
    return st.text_input(label, "", placeholder=default, help=_help(name), key=key)


def _choices(name: str) -> list[str]:
    """The values of a setting that has few; empty for one that has many."""
    kind = _info(name).annotation
    if kind is bool:
        return ["false", "true"]
    if get_origin(kind) is Literal:
        return [_shown(value) for value in get_args(kind)]
    if get_origin(kind) in (Union, UnionType) and get_args(kind) == (bool, str):
        return ["true", "false"]
    return []


def _default(name: str) -> Any:
    return _info(name).get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n")[0]


def _help(name: str) -> str:
    return f"{name}: {setting_names()[name]}".replace("{", "\\{")


def _info(name: str) -> Any:
    group, _, field = name.partition(".")
    return RunConfig.model_fields[group].annotation.model_fields[field]  # type: ignore[union-attr]
