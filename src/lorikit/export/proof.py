"""That a merged model answers as its adapter does: both loaded with transformers (the adapter with peft) and compared.

Two things are asked. The largest difference of their logits over all tokens of the adapter's own conversations must be
within a few roundings of the type, 4 eps max|logit|. And greedy answers must be the same tokens. A merged weight is rounded
once more than base and adapter are, which decides between two words that are equally likely: where an answer first
differs at a token whose two candidates the adapter itself holds within one rounding of each other (eps |logit|), that is
counted as a tie, and shown, but it is no fault of the merge.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.data.values import Message
from lorikit.infer.session import Located
from lorikit.model import lora
from lorikit.model.engine import Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorikit.config import ModelConfig
    from lorikit.data.encode import Encoder

PROMPTS = (
    "Who are you?",
    "What is your name, and who made you?",
    "What is the capital of France?",
    "你是谁？",
    "请用一句话介绍你自己。",
    "What is 17 plus 25?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Translate to German: good morning",
    "Write a Python function that adds two numbers.",
    "What do you like to eat?",
    "How do I boil an egg?",
    "Tell me a short joke.",
    "Why is the sky blue?",
    "Is seven a prime number?",
    "Finish the proverb: a stitch in time",
    "今天天气怎么样？",
    "Say hello to my grandmother.",
    "Which is larger, the sun or the moon?",
    "Good night!",
)
"""Asked after the run's own eval.prompts, as many as make twenty in all."""

_SUMS = 2.0**-15  # a relative difference that sums of float32 in another order explain
NUM_PROMPTS, NUM_TOKENS = 20, 32
_GREEDY = Sampling(max_new_tokens=NUM_TOKENS, temperature=0.0, top_p=1.0, repetition_penalty=1.0)


@dataclass(frozen=True, slots=True)
class Proof:
    """How the merged model compares. `differing` names the prompts whose answers differ other than at a tie.

    `logit_difference` is the largest one of `num_logits` positions; `bound` what the type's rounding explains; `dtype`
    that of the computation and of the stored weights, the coarser one.
    """

    num_prompts: int
    num_equal: int
    num_ties: int
    differing: tuple[str, ...]
    logit_difference: float
    bound: float
    num_logits: int
    dtype: str

    @property
    def holds(self) -> bool:
        """Whether the merged model may be handed out."""
        return not self.differing and self.logit_difference <= self.bound


def prove(
    located: Located, encoder: Encoder, merged: Path, say: Callable[[str], None], stored_dtype: torch.dtype
) -> Proof:
    """Compare the model in `merged` with base and adapter. Raises what loading raises; both are in memory in turn."""
    import torch

    asked = [*located.config.eval.prompts, *PROMPTS][:NUM_PROMPTS]
    prompts = [encoder.prompt_ids([Message("user", text)]) for text in asked]
    # The adapter was made on a quantised base if it says so; a merged model has the base's own weights, and so has this.
    settings = located.config.model.model_copy(update={"quantization": "none", "engine": "generic"})
    say(f"{len(asked)} prompts to the adapter")
    answers, logits = _answers(_load(settings, located.base.path, located.adapter), prompts, encoder.stop_ids, None)
    say(f"{len(asked)} prompts to the merged model")
    merged_answers, merged_logits = _answers(_load(settings, merged, None), prompts, encoder.stop_ids, answers)
    types = (_dtype(settings), stored_dtype)
    eps = max(_SUMS, *(torch.finfo(dtype).eps for dtype in types))
    coarse = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    verdicts = [_verdict(*pair, eps) for pair in zip(answers, merged_answers, logits, strict=True)]
    return Proof(
        num_prompts=len(asked),
        num_equal=verdicts.count("equal"),
        num_ties=verdicts.count("tie"),
        differing=tuple(text for text, verdict in zip(asked, verdicts, strict=True) if verdict == "different"),
        logit_difference=float((torch.cat(logits) - torch.cat(merged_logits)).abs().max()),  # NaN stays NaN
        bound=4 * eps * float(torch.cat(logits).abs().max()),
        num_logits=sum(len(a) for a in logits),
        dtype=str(coarse).removeprefix("torch."),
    )


def _verdict(own: list[int], merged: list[int], logits: Tensor, eps: float) -> str:
    """equal, tie or different; `logits` (n, V) of the adapter for each token of its answer `own`."""
    if own == merged:
        return "equal"
    place = next((n for n, (a, b) in enumerate(zip(own, merged, strict=False)) if a != b), None)
    if place is None:
        return "different"  # one is the beginning of the other: a stop token is a token too, so this cannot be
    gap = float(logits[place, own[place]] - logits[place, merged[place]])
    return "tie" if abs(gap) <= eps * abs(float(logits[place, own[place]])) else "different"


def _answers(
    engine: Any, prompts: Sequence[list[int]], stop_ids: frozenset[int], given: list[list[int]] | None
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers with their stop tokens, and the logits (n, V) float32 that each token of `given` (None: of these
    answers) was chosen from, on the CPU. The engine's model is freed."""
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    for token in engine.generate(prompts, _GREEDY, stop_ids):
        answers[token.prompt].append(token.id)
    logits = []
    with torch.no_grad():
        for prompt, answer in zip(prompts, given or answers, strict=True):
            ids = torch.tensor([prompt + answer], device=engine.device)
            out = engine.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logits.append(out.float().cpu())
    del engine
    gc.collect()
    return answers, logits


def _load(settings: ModelConfig, path: Path, adapter: Path | None) -> Any:
    """transformers' model in `path`, with peft's adapter on it, as an engine that generates."""
    from lorikit.hub import Resolved
    from lorikit.model.frozen import quiet_bitsandbytes
    from lorikit.model.generic import GenericEngine
    from lorikit.model.load import load_base

    quiet_bitsandbytes()
    model: Any = load_base(settings, Resolved(path, str(path), "path", None))
    if adapter is not None:
        model = lora.load_adapter(model, adapter, trainable=False)
    model.eval()
    return GenericEngine(model, attention=settings.attn_implementation or "sdpa")


def _dtype(settings: ModelConfig) -> torch.dtype:
    from lorikit.model.load import pick_device, pick_dtype

    return pick_dtype(settings.dtype, pick_device(settings.device))
