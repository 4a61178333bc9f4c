"""Which files of a repository make a model or a data set, and whether a model folder on this disk is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from lorikit.errors import DataError, ModelError

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack")
# Code that comes with a model is text like the rest: nothing runs it unless model.trust_remote_code is on.
_BESIDE_WEIGHTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_DATA = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def needed_files(names: Collection[str], what: str) -> list[str]:
    """Of the files of a model repository those that a model is loaded from: never pickles or GGUF, weights only once.

    `what` names the repository in the ModelError that is raised when it holds no weights as safetensors.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    elif INDEX in top:
        weights = [name for name in weights if _SHARD.fullmatch(name)]
    if "config.json" not in top or not weights:
        raise ModelError(f"{what}: {_no_model(names)}")
    beside = [name for name in top if name.endswith(_BESIDE_WEIGHTS)]
    templates = [name for name in names if re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", name)]
    return sorted({*weights, *beside, *templates})


def needed_data(names: Collection[str], inside: str, what: str) -> list[str]:
    """The data files of a data-set repository, or those in its folder or file `inside`; DataError when there are none."""
    chosen = [
        name
        for name in names
        if name.lower().removesuffix(".gz").endswith(_DATA)
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
        and (not inside or name == inside or name.startswith(inside + "/"))
    ]
    if not chosen:
        held = ", ".join(sorted(names)[:6]) + (", ..." if len(names) > 6 else "")
        where = f" called {inside}" if inside else ""
        raise DataError(f"{what}: no data file{where} ({', '.join(_DATA)}); it holds {held or 'nothing'}")
    return sorted(chosen)


def check_model_folder(folder: Path) -> None:
    """ModelError with everything that keeps `folder` from being a model: config, whole safetensors, tokenizer."""
    names = {path.name for path in folder.iterdir()}
    problems = []
    if "config.json" not in names:
        adapter = folder if "adapter_config.json" in names else folder / "adapter"
        if (adapter / "adapter_config.json").is_file():
            base = _json(adapter / "adapter_config.json").get("base_model_name_or_path") or "recorded in it"
            raise ModelError(
                f"{folder}: an adapter, not a model; give its base ({base}) as the model, "
                f"and {adapter} as lora.init_adapter to go on training it"
            )
        raise ModelError(f"{folder}: {_no_model(names)}")
    if not isinstance(_json(folder / "config.json"), dict):
        problems.append("config.json is no mapping")
    problems += _weights_problems(folder, names)
    if not any(name in _TOKENIZERS or name.endswith((".tiktoken", "tekken.json")) for name in names):
        problems.append("no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if problems:
        raise ModelError(f"{folder}: {'; '.join(problems)}")


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header and its size, or None; reads no tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head.startswith(b"version "):
            return "is a git-lfs pointer, not the weights: run git lfs pull in that folder"
        if len(head) < 8 or length > size - 8:
            return f"is not a whole safetensors file ({size} bytes)"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return "has a damaged safetensors header"
    return None if size == whole else f"is cut off or damaged: {size} bytes instead of {whole}"


def _weights_problems(folder: Path, names: Collection[str]) -> list[str]:
    """As transformers chooses: model.safetensors, else what the index names, else any safetensors."""
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    elif INDEX in names:
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            return [f"{INDEX} names no weights"]
        weights = sorted({str(shard) for shard in shards.values()})
    if not weights:
        return [_no_model(names)]
    problems = [f"{name} is missing, which {INDEX} names" for name in weights if not (folder / name).is_file()]
    for name in weights:
        if (folder / name).is_file() and (problem := safetensors_problem(folder / name)):
            problems.append(f"{name} {problem}")
    return problems


def _no_model(names: Collection[str]) -> str:
    """Why these files are no model that can be loaded."""
    if "adapter_config.json" in names and "config.json" not in names:
        return "an adapter, not a model; give its base, and a downloaded copy of it as lora.init_adapter"
    if any(name.endswith(".safetensors") for name in names):
        return f"no config.json beside the weights; found {', '.join(sorted(names)[:6])}"
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        return (
            f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read and are never "
            "loaded here; look for a revision or copy of it with safetensors"
        )
    if any(name.endswith(".gguf") for name in names):
        return "only GGUF files, which are for inference; take the repository that they were made from"
    return f"no config.json with safetensors; found {', '.join(sorted(names)[:6]) or 'nothing'}"


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a mapping is expected")
    return value
