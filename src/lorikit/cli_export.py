"""The verbs that hand a run on: merge and export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorikit.cli_data import Force, Json, print_json, say


def merge(
    run: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    dtype: str = "auto",
    device: str = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fold the adapter of RUN into its base: one model folder, for transformers, vLLM, Ollama. Refused unless proven equal.

    The merged model is loaded again and compared with the adapter: logits, and greedy answers to 20 prompts. If they differ
    by more than rounding explains, it is removed and the exit code is 4.

    Parameters
    ----------
    run
        A run folder, a checkpoint, a PEFT adapter folder.
    output
        The folder to write; it appears when it is complete and proven.
    dtype
        auto (as the base is stored), bfloat16, float16 or float32.
    device
        Where it is compared: auto, cpu, cuda, cuda:N or mps.
    """
    from lorikit.export.merge import merge as fold

    merged = fold(run, output, dtype=dtype, device=device, force=force, say=say, done=_tensors)
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
