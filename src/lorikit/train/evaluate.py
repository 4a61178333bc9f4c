"""What a run looks like from outside while it trains: loss on held-out rows, answers to a few fixed prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

from lorikit.data.encode import Encoder
from lorikit.data.pack import pack, split_step
from lorikit.data.values import Example, Message
from lorikit.errors import Interrupted
from lorikit.model.engine import Engine, Sampling
from lorikit.train.distributed import AgreedSignals, Ranks, lengths_of
from lorikit.train.optim import Budget, num_forwards
from lorikit.train.signals import Signals

_BLOCK = 256  # rows packed at a time
_BLOCK_CPU = 32  # of several ranks on CPUs, which look for signals only between blocks


def held_out_loss(
    engine: Engine,
    examples: Sequence[Example],
    budget: Budget,
    signals: Signals | AgreedSignals,
    ranks: Ranks,
) -> float:
    """Mean cross entropy over the labelled tokens of all rows, dropout off; with several ranks each computes its part.

    Raises Interrupted between forwards, with several ranks between blocks of rows, on all of them.
    """
    sums: list[float] = []
    count = 0
    block: list[float] = []
    size = _BLOCK
    if ranks.active:
        size = ranks.size * (_BLOCK_CPU if engine.device.type == "cpu" else _BLOCK)

    def forward(share: list[Example]) -> None:
        signals.check()
        block.extend(engine.token_losses(pack(share)).tolist())

    engine.train(False)
    try:
        for start in range(0, len(examples), size):
            rows = examples[start : start + size]
            part = ranks.share(rows, lengths_of(rows))
            block.clear()
            if engine.sharded:
                idle = num_forwards(ranks, rows, budget.max_tokens) - (
                    len(split_step(part, budget.max_tokens)) if part else 0
                )
                for _ in range(idle):
                    engine.token_losses(pack(rows[:1]))
            if part:
                budget.run(part, block.clear, forward)
            sums.append(math.fsum(block))
            count += len(block)
            if isinstance(signals, AgreedSignals):
                signals.agree()
                signals.check()
    finally:
        engine.train(True)
    told = ranks.numbers(math.fsum(sums), count)
    return math.fsum(total for total, _ in told) / sum(number for _, number in told)


def agreed_answers(
    engine: Engine,
    encoder: Encoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    signals: Signals | AgreedSignals,
    ranks: Ranks,
) -> list[dict[str, str]]:
    """`answers`, with several ranks by rank 0 alone, while the others wait. Raises Interrupted on all of them."""
    if not isinstance(signals, AgreedSignals):
        return answers(engine, encoder, prompts, max_new_tokens, signals.check)
    found: list[dict[str, str]] = []
    if ranks.first or engine.sharded:  # whose forwards take all ranks, to the end
        check = (lambda: None) if engine.sharded else signals.own.check
        with suppress(Interrupted):  # which the others hear of next
            found = answers(engine, encoder, prompts, max_new_tokens, check)
    signals.agree()
    signals.check()
    return found


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
