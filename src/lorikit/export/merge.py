"""`lorikit merge`: a run becomes one model folder that loads wherever its base loads, proven to answer as the adapter does.

The folder is staged beside its place, compared there, and renamed only when the proof holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.errors import ConfigError, DiskError, ModelError
from lorikit.export.fold import SHARD_BYTES, cast, write_shards
from lorikit.export.proof import Proof, prove
from lorikit.infer.session import Located, locate
from lorikit.model.lora_fold import Stored, Update, read_updates, stored_tensors
from lorikit.train.card import public_name
from lorikit.train.storage import new_folder

if TYPE_CHECKING:
    import torch

    from lorikit.data.encode import Encoder

DTYPES = ("auto", "bfloat16", "float16", "float32")
RECORD = "lorikit_merge.json"
_SPARE = 2**28  # bytes left free beside the weights, for the small files and whatever else writes there
_TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model that was handed out. `num_bytes` are its weights'; `system` the run's system prompt, which is no
    part of a model: who asks it has to send it."""

    folder: Path
    base: str
    adapter: str
    num_matrices: int
    num_files: int
    num_bytes: int
    system: str | None
    proof: Proof
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {**asdict(self), "folder": str(self.folder)}


def merge(
    run: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda text: None,
    done: Callable[[int, int], None] = lambda done, total: None,
    beside: Callable[[Path, Encoder], None] = lambda folder, encoder: None,
) -> Merged:
    """Fold the adapter of a run (or of a checkpoint or adapter folder) into its base and write the model to `output`.

    `dtype` auto stores every tensor in the base's own type; the fold is computed in float32. Raises ConfigError for a
    place that is taken, DiskError before anything is written where it would not fit, ModelError for an adapter that
    cannot be merged or a merged model that does not answer as its adapter; then nothing is left at `output`. `beside` may
    write more files into the folder before it appears, and raise.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}: {', '.join(DTYPES)}")
    output = Path(output)
    _check_place(output, force=force)
    located = locate(run, device=device)
    assert located.adapter is not None
    if located.base.path.resolve() == output.resolve():
        raise ConfigError(f"{output} is the base itself: name another folder")
    encoder = located.encoder()
    tensors = stored_tensors(located.base.path)
    updates = read_updates(located.adapter, tensors)
    num_bytes = sum(stored.num_bytes for stored in cast(tensors, dtype))
    _check_disk(output, num_bytes)
    notes = _notes(located)
    with new_folder(output) as staged:
        files = write_shards(staged, tensors, updates, dtype=dtype, shard_bytes=shard_bytes, done=done)
        _write_beside(staged, located, encoder, dtype)
        beside(staged, encoder)
        proof = prove(located, encoder, staged, say, _coarsest(tensors, updates, dtype))
        if not proof.holds:
            raise ModelError(_refusal(proof, dtype))
        record = {"base": public_name(located.base.name), "revision": located.base.revision, "proof": asdict(proof)}
        (staged / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return Merged(
        output, located.base.name, str(located.adapter), len(updates), len(files), num_bytes,
        located.config.data.system, proof, notes,
    )  # fmt: skip


def _check_place(output: Path, *, force: bool) -> None:
    """ConfigError unless `output` is free, or with `force` a merged model of ours."""
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.absolute().parent}; make it first")
    if output.is_file():
        raise ConfigError(f"{output} is a file; name a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / RECORD).is_file():
        raise ConfigError(f"{output} holds other files; name a new or an empty folder")
    if not force:
        raise ConfigError(f"{output} holds a merged model; name another folder, or add --force to replace it")


def _check_disk(output: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if free < num_bytes + _SPARE:
        raise DiskError(
            f"{output}: the merged model takes {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; make room or "
            "name a folder on another disk"
        )


def _notes(located: Located) -> tuple[str, ...]:
    notes = list(located.notes)
    bits = located.config.model.quantization
    if bits != "none":
        notes.append(
            f"trained on the base in {bits}; the merged model has the base's own weights and answers a little differently"
        )
    if located.config.data.system:
        notes.append("the run's system prompt (data.system) is no part of a model: send it with each conversation")
    return tuple(notes)


def _write_beside(staged: Path, located: Located, encoder: Encoder, dtype: str) -> None:
    """Everything but the weights: the base's config and code, the run's tokenizer and chat template, where to stop."""
    base = located.base.path
    for path in base.iterdir():
        keep = path.suffix in (".json", ".py") and not path.name.startswith((*_TOKENIZER_FILES, "model.safetensors"))
        if path.is_file() and keep:
            shutil.copyfile(path, staged / path.name)
    encoder.save_tokenizer(staged)
    if dtype != "auto":
        _update_json(staged / "config.json", {"dtype": dtype})
    stops = sorted(encoder.stop_ids)
    _update_json(staged / "generation_config.json", {"eos_token_id": stops if len(stops) > 1 else stops[0]})
    name = public_name(located.base.name)
    card = (
        f"---\nbase_model: {name}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [lorikit]\n---\n\n"
        f"# {name} with a LoRA adapter merged into it\n\nMade with `lorikit merge`; {RECORD} says how it compares with the "
        "adapter.\n"
    )
    (staged / "README.md").write_text(card, encoding="utf-8")


def _update_json(path: Path, values: dict[str, Any]) -> None:
    """Set keys of a JSON file that may not be there yet; one that says the same under another name is replaced."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "dtype" in values:
        content.pop("torch_dtype", None)
    path.write_text(json.dumps(content | values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _coarsest(tensors: Sequence[Stored], updates: dict[str, Update], dtype: str) -> torch.dtype:
    """The type with the largest rounding among those that merged weights are stored in."""
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {types[stored.dtype] for stored in cast(tensors, dtype) if stored.name in updates}
    return max(found, key=lambda t: torch.finfo(t).eps)


def _refusal(proof: Proof, dtype: str) -> str:
    wrong = []
    if not proof.logit_difference <= proof.bound:
        wrong.append(
            f"logits differ by up to {proof.logit_difference:.3g}, more than rounding explains ({proof.bound:.3g})"
        )
    if proof.differing:
        shown = ", ".join(repr(text[:40]) for text in proof.differing[:2])
        wrong.append(f"{len(proof.differing)} of {proof.num_prompts} greedy answers differ ({shown})")
    hint = "" if dtype == "float32" else f"; {proof.dtype} rounds the merged weights, --dtype float32 does not"
    return f"the merged model does not answer as its adapter, so it was removed: {'; '.join(wrong)}{hint}"
