"""Logits -> the next token of each sequence, in the order of transformers: penalty, temperature, top k, top p, min p, draw.

penalty      s / c where s > 0, s c where not, for tokens that stand in the sequence already
top p        the fewest tokens, likeliest first, whose probabilities reach p together
min p        tokens with at least that share of the likeliest one's probability

A draw needs one number u in [0, 1), a hash of the request's seed and of the place in its answer: tokens are laid end to end,
each as long as it is likely, and the one is taken in which u falls. So an answer depends on nothing that runs beside it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorikit.model.engine import Sampling

_CANDIDATES = 512  # on a CPU, where sorting a vocabulary takes milliseconds, it is tried with so many first


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings of N sequences, (N,) each: float32 and, for seed and place, int64. What none of them uses is off."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    penalty: Tensor
    seed: Tensor
    place: Tensor
    draws: bool
    filters: bool
    penalises: bool

    @classmethod
    def of(cls, settings: Sequence[Sampling], places: Sequence[int], device: torch.device) -> Choice:
        """The settings of each sequence and how many tokens of its answer it has; one without a seed draws one."""
        numbers = torch.tensor([values(s) for s in settings], dtype=torch.float32).to(device)
        seeds = [draw_seed(s) for s in settings]
        counters = torch.tensor([seeds, list(places)], dtype=torch.int64).to(device)
        return cls.rows(numbers, counters[0], counters[1], modes(settings))

    @classmethod
    def rows(cls, numbers: Tensor, seed: Tensor, place: Tensor, used: tuple[bool, bool, bool]) -> Choice:
        """From the `values` of N sequences (N, 5), their seeds and places (N,), and the `modes` of all."""
        temperature, top_p, top_k, min_p, penalty = numbers.unbind(1)
        draws, filters, penalises = used
        return cls(temperature, top_p, top_k, min_p, penalty, seed, place, draws, filters, penalises)


def values(sampling: Sampling) -> tuple[float, float, float, float, float]:
    """temperature, top_p, top_k, min_p and penalty as numbers, top_k 0 as none."""
    s = sampling
    return s.temperature, s.top_p, float(s.top_k or math.inf), s.min_p, s.repetition_penalty


def draw_seed(sampling: Sampling) -> int:
    """The request's own seed, or a new one, from no generator that anybody else uses."""
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


def modes(settings: Sequence[Sampling]) -> tuple[bool, bool, bool]:
    """Whether any of them draws, leaves tokens out before it draws, penalises what was said."""
    drawing = [s for s in settings if s.temperature > 0]
    filters = any(s.top_p < 1 or s.top_k > 0 or s.min_p > 0 for s in drawing)
    return bool(drawing), filters, any(s.repetition_penalty != 1 for s in settings)


def next_tokens(logits: Tensor, seen: Tensor | None, choice: Choice) -> Tensor:
    """logits (N, V) float32, seen (N, V) bool: which tokens a sequence holds already (None where nothing is penalised)
    -> (N,) int64."""
    logits = penalised(logits, seen, choice)
    greedy = logits.argmax(1)
    if not choice.draws:
        return greedy
    u = uniform(choice.seed, choice.place)[:, None]
    weights, ids = _candidates(logits, choice)
    ends = weights.cumsum(1, dtype=torch.float64)
    # u is below 1 by more than a float64 rounds: the place found has a weight of its own.
    at = torch.searchsorted(ends, u * ends[:, -1:], right=True).clamp_(max=weights.shape[1] - 1)
    drawn = (at if ids is None else ids.gather(1, at))[:, 0]
    return torch.where(choice.temperature > 0, drawn, greedy)


def probabilities(logits: Tensor, seen: Tensor | None, choice: Choice) -> Tensor:
    """(N, V) float32: what the next token is drawn from, for temperatures above 0; arguments as for `next_tokens`."""
    weights, ids = _candidates(penalised(logits, seen, choice), choice)
    if ids is not None:
        weights = torch.zeros_like(logits).scatter_(1, ids, weights)
    return weights / weights.sum(1, keepdim=True)


def penalised(logits: Tensor, seen: Tensor | None, choice: Choice) -> Tensor:
    """Logits with the repetition penalty applied."""
    if not choice.penalises:
        return logits
    assert seen is not None
    penalty = choice.penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def uniform(seed: Tensor, place: Tensor) -> Tensor:
    """(N,) float64 in [0, 1), multiples of 2^-31: the mixing steps of splitmix64 (Steele et al. 2014) over both numbers."""
    z = _mix(seed + _GOLDEN) + (place + 1) * _GOLDEN
    return (_mix(z) >> 33 & 0x7FFFFFFF).double() * 2.0**-31


def _candidates(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor | None]:
    """Weights (N, C) of the tokens that may be drawn, 0 for those left out, and their ids, None for all in order."""
    scaled = logits / torch.where(choice.temperature > 0, choice.temperature, 1)[:, None]
    if not choice.filters:
        return scaled.softmax(1), None
    if scaled.device.type == "cpu" and scaled.shape[1] > _CANDIDATES:
        some, ids = scaled.topk(_CANDIDATES, 1)
        total = scaled.logsumexp(1, keepdim=True)
        kept = _filtered(some, total, choice)
        if bool((kept[:, -1] == 0).all()):  # nothing beyond them would be kept either
            return kept, ids
    ordered, ids = scaled.sort(1, descending=True)
    return _filtered(ordered, ordered.logsumexp(1, keepdim=True), choice), ids


def _filtered(ordered: Tensor, total: Tensor, choice: Choice) -> Tensor:
    """ordered (N, C): the largest logits, descending; total (N, 1): the logsumexp of all -> weights (N, C)."""
    least = choice.top_k.clamp(max=ordered.shape[1]).long()[:, None] - 1
    # As in transformers, all that equal the last of the k stay.
    out = (ordered < ordered.gather(1, least)) & (choice.top_k[:, None] <= ordered.shape[1])
    weights = (ordered - total).exp().masked_fill(out, 0)
    limited = choice.top_k[:, None] < math.inf
    mass = torch.where(limited, weights.sum(1, keepdim=True), 1)  # of what top k leaves; without it, of everything
    before = weights.cumsum(1) - weights
    out = (before >= choice.top_p[:, None] * mass) & (choice.top_p[:, None] < 1)
    out |= weights < choice.min_p[:, None] * weights[:, :1]
    out[:, 0] = False
    return weights.masked_fill(out, 0)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def _signed(number: int) -> int:
    """The int64 with these 64 bits."""
    return number - (1 << 64) if number >> 63 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)
