"""Writes settings.md from the settings model, so that names, defaults and meanings are declared only once."""

import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorikit.config import RunConfig

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

Every setting of a run, written by `make docs` from the model in `src/lorikit/config.py`. In a YAML file they stand in
their group; on the command line they are flags, which win over the file: `lorikit train run.yaml --lora.r 16`. An
unknown name is an error that names the nearest one. `lorikit config run.yaml` prints the resolved settings, `lorikit
config --schema` the JSON schema for your editor.
"""


def page() -> str:
    """The whole page: a table for each group."""
    parts = [HEAD]
    for group, holder in RunConfig.model_fields.items():
        model: Any = holder.annotation
        parts.append(f"\n## {group}\n\n{model.__doc__}\n\n| setting | values | default | |\n|---|---|---|---|\n")
        for name, field in model.model_fields.items():
            cells = [f"`{name}`", values(field.annotation), default(field), field.description or ""]
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def values(of: Any) -> str:
    """What a setting takes, in words: int -> number, Literal -> its values."""
    origin = typing.get_origin(of)
    arguments = typing.get_args(of)
    if origin is typing.Annotated:
        return values(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{yaml_word(a)}`" for a in arguments)
    if origin in (UnionType, typing.Union):
        return " or ".join(dict.fromkeys(values(a) for a in arguments))
    if origin is list:
        return f"list of {values(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", NoneType: "`null`"}[of]


def default(field: FieldInfo) -> str:
    """The default as YAML writes it."""
    value = field.get_default(call_default_factory=True)
    return "required" if value is PydanticUndefined else f"`{yaml_word(value)}`"


def yaml_word(value: Any) -> str:
    """One value as it stands in a YAML file."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return {"[]": "[]", "{}": "{}"}.get(str(value), f"{value:g}" if isinstance(value, float) else str(value))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
