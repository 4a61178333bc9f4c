"""What vLLM needs of an adapter, and its own server's command line for the same models under the same names.

Written against vLLM 0.8 to 0.27: `--max-lora-rank` takes the ranks of RANKS; an adapter's rank may be anything up to it.
Adapters with DoRA, modules_to_save or trained biases are refused by vLLM; ranks and alphas that differ from module to
module are not read by it, so that it would scale them wrongly without a word.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorikit.errors import ModelError
from lorikit.infer.session import Located
from lorikit.model import lora
from lorikit.train.card import public_name

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MODULES = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "embed_tokens",
    "lm_head",
})  # fmt: skip


def max_lora_rank(rank: int) -> int | None:
    """The smallest value of --max-lora-rank that takes this rank; None if there is none."""
    return next((allowed for allowed in RANKS if rank <= allowed), None)


def problems(values: Mapping[str, Any]) -> list[str]:
    """Why vLLM would refuse an adapter with this adapter_config.json, or serve it wrongly; empty if it takes it."""
    found = []
    rank = values.get("r")
    if not isinstance(rank, int) or max_lora_rank(rank) is None:
        found.append(f"r is {rank}, vLLM takes at most {RANKS[-1]}")
    if values.get("modules_to_save"):
        found.append("it has modules_to_save, which vLLM does not load: merge it")
    if values.get("use_dora"):
        found.append("it is a DoRA adapter, which vLLM does not load: merge it with peft")
    if values.get("bias", "none") != "none":
        found.append(f"it trains biases (bias: {values['bias']}), which vLLM does not load")
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key):
            found.append(f"it has {key}, which vLLM does not read, so that it would scale wrongly: merge it")
    targets = values.get("target_modules")
    if isinstance(targets, list):
        other = sorted({str(t).rpartition(".")[2] for t in targets} - _MODULES)
        found += [f"it adapts {', '.join(other)}: look whether vLLM adapts these in your model"] if other else []
    return found


def command(placed: Mapping[str, Located], host: str, port: int, max_length: int | None) -> list[str]:
    """The arguments that start vLLM's server for these runs. ModelError lists what vLLM would refuse.

    Models have the names that Lorikit's own server gives them. The key goes by VLLM_API_KEY, never by an argument.
    """
    wrong, rank = [], 1
    for name, located in placed.items():
        assert located.adapter is not None
        values = lora.read_config(located.adapter)
        wrong += [f"{name}: {problem}" for problem in problems(values) if "look whether" not in problem]
        rank = max(rank, int(values.get("r") or 1))
    if wrong:
        raise ModelError("; ".join(wrong))
    first = next(iter(placed.values()))
    base = public_name(first.base.name)
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(first.base.path)]
    arguments += [
        "--served-model-name",
        base + "-base" if base in placed else base,
        "--host",
        host,
        "--port",
        str(port),
    ]
    arguments += ["--enable-lora", "--max-loras", str(len(placed)), "--max-lora-rank", str(max_lora_rank(rank))]
    arguments += ["--lora-modules", *(f"{name}={located.adapter}" for name, located in placed.items())]
    template = _template(first)
    arguments += ["--chat-template", str(template)] if template else []
    arguments += ["--max-model-len", str(max_length)] if max_length else []
    return arguments


def check_installed() -> None:
    """ModelError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("vLLM is not installed in this environment: pip install vllm, or leave out --engine vllm")


def _template(located: Located) -> Path | None:
    """The chat template that the run was trained with, beside its adapter."""
    assert located.adapter is not None
    for folder in (located.adapter, located.adapter.parent / "adapter"):
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").absolute()
    return None
