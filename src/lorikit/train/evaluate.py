"""What a run looks like from outside while it trains: loss on held-out rows, answers to a few fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lorikit.data.encode import Encoder
from lorikit.data.pack import pack
from lorikit.data.values import Example, Message
from lorikit.model.engine import Engine, Sampling
from lorikit.train.optim import Budget

_BLOCK = 256  # rows packed at a time


def held_out_loss(engine: Engine, examples: Sequence[Example], budget: Budget, check: Callable[[], None]) -> float:
    """Mean cross entropy over the labelled tokens of all rows, dropout off. `check` may raise between forwards."""
    sums: list[float] = []
    count = 0
    block: list[float] = []

    def forward(share: list[Example]) -> None:
        check()
        block.extend(engine.token_losses(pack(share)).tolist())

    engine.train(False)
    try:
        for start in range(0, len(examples), _BLOCK):
            budget.run(examples[start : start + _BLOCK], block.clear, forward)
            sums.append(math.fsum(block))
            count += len(block)
    finally:
        engine.train(True)
    return math.fsum(sums) / count


def answers(
    engine: Engine, encoder: Encoder, prompts: Sequence[str], max_new_tokens: int, check: Callable[[], None]
) -> list[dict[str, str]]:
    """Each prompt with its greedy answer, as "prompt" and "answer". `check` may raise between tokens."""
    ids = [encoder.prompt_ids([Message("user", prompt)]) for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    greedy = Sampling(max_new_tokens=max_new_tokens, temperature=0.0, top_p=1.0, repetition_penalty=1.0)
    tokens = engine.generate(ids, greedy, encoder.stop_ids)
    engine.train(False)
    try:
        for token in tokens:
            check()
            if token.finish != "stop":
                texts[token.prompt].append(token.id)
    finally:
        tokens.close()  # after an interruption, end the generation now and not when the exception is forgotten
        engine.train(True)
    return [{"prompt": prompt, "answer": encoder.decode(text)} for prompt, text in zip(prompts, texts, strict=True)]
