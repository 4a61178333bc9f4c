"""The verbs that hand a run on: merge and export."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorikit.cli_data import Force, Json, print_json, say
from lorikit.errors import ConfigError

if TYPE_CHECKING:
    from lorikit.export.merge import Merged


@Parameter(name="*")
@dataclass(frozen=True)
class Folding:
    """Where and how an adapter is folded into its base.

    Parameters
    ----------
    output
        The folder to write; it appears when it is complete and proven.
    dtype
        auto (as the base is stored), bfloat16, float16 or float32.
    device
        Where it is compared: auto, cpu, cuda, cuda:N or mps.
    """

    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    dtype: str = "auto"
    device: str = "auto"
    force: Force = False

    def fold(self, run: str, **more: Any) -> Merged:
        """`export.merge.merge` of the run, its progress shown."""
        from lorikit.export.merge import merge as fold

        chosen: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "force": self.force}
        return fold(run, self.output, **chosen, say=say, done=_tensors, **more)


def merge(
    run: str,
    /,
    *,
    folding: Folding,
    as_json: Json = False,
) -> None:
    """Fold the adapter of RUN into its base: one model folder, for transformers, vLLM, Ollama. Refused unless proven equal.

    The merged model is loaded again and compared with the adapter: logits, and greedy answers to 20 prompts. If they differ
    by more than rounding explains, it is removed and the exit code is 4.

    Parameters
    ----------
    run
        A run folder, a checkpoint, a PEFT adapter folder.
    """
    _tell(folding.fold(run), as_json=as_json)


def export(
    run: str,
    /,
    *,
    to: str,
    folding: Folding,
    as_json: Json = False,
) -> None:
    """Write RUN in the form of another program: ollama, a merged model with a Modelfile that has its chat template.

    Merged and proven as `lorikit merge` does; then: ollama create NAME -f DIR/Modelfile

    Parameters
    ----------
    run
        A run folder, a checkpoint, a PEFT adapter folder.
    to
        ollama. For gguf, merge, and give the folder to llama.cpp's convert_hf_to_gguf.py.
    """
    if to == "gguf":
        raise ConfigError(
            "--to gguf: not written here; merge, and give the folder to llama.cpp's convert_hf_to_gguf.py"
        )
    if to != "ollama":
        raise ConfigError(f"--to is {to!r}: ollama")
    from lorikit.export.ollama import write_modelfile

    _tell(folding.fold(run, beside=write_modelfile), as_json=as_json)
    say(f"next: ollama create NAME -f {folding.output / 'Modelfile'}")


def _tell(merged: Merged, *, as_json: bool) -> None:
    for note in merged.notes:
        say(note)
    if as_json:
        print_json(merged.to_dict())
        return
    proof = merged.proof
    ties = f", {proof.num_ties} more up to a tie between two tokens" if proof.num_ties else ""
    say(
        f"{merged.num_matrices} matrices folded, {merged.num_bytes / 1e9:.2f} GB; {proof.num_equal} of {proof.num_prompts} "
        f"greedy answers are equal{ties}; logits differ by at most {proof.logit_difference:.2g} ({proof.dtype} rounding "
        f"explains {proof.bound:.2g})"
    )
    print(merged.folder)


def _tensors(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} tensors", end="\n" if done == total else "", file=sys.stderr, flush=True)
