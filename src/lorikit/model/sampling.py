"""Logits -> the next token of each sequence, in the order of transformers: penalty, temperature, top k, top p, draw.

penalty      s / c where s > 0, s c where not, for tokens that stand in the sequence already
top p        the fewest tokens, likeliest first, whose probabilities reach p together
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorikit.model.engine import Sampling


def next_tokens(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits (N, V) float32, seen (N, V) bool: which tokens a sequence holds already -> (N,) int64."""
    if sampling.temperature == 0:
        return _penalised(logits, seen, sampling.repetition_penalty).argmax(1)
    return torch.multinomial(probabilities(logits, seen, sampling), 1, generator=generator)[:, 0]


def probabilities(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) float32: what the next token is drawn from, for a temperature above 0; arguments as for `next_tokens`."""
    logits = _penalised(logits, seen, sampling.repetition_penalty) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(1, descending=True)
        share = ordered.softmax(1)
        beyond = share.cumsum(1) - share >= sampling.top_p  # what stands before it is enough; never so for the first
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logits.softmax(1)


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
