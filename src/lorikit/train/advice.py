"""What to change where a run does not fit, or where it could be faster: each suggestion with the figures it would have.

Suggestions are computed as the run itself is: the same rows, other settings. They come in the order of what they cost:
first what changes nothing about the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorikit.config import RunConfig
from lorikit.data.values import Example
from lorikit.train import predict
from lorikit.train.cost import GIB, Forward, Row, row_of
from lorikit.train.plan_costs import Costs, Target, costs_of

if TYPE_CHECKING:
    from lorikit.hub import Resolved


def advice(
    config: RunConfig,
    base: Resolved,
    target: Target,
    costs: Costs,
    predicted: predict.Prediction,
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> list[str]:
    """Sentences for the person who plans; none where nothing is known of the memory or nothing needs to change."""
    if predicted.fits is None or predicted.memory is None:
        return []
    searched = _Search(config, base, target, train, held_out)
    if predicted.fits:
        return list(searched.faster(predicted))
    return list(searched.smaller(costs, predicted))


class _Search:
    """Other settings of one run, tried one after the other."""

    def __init__(
        self,
        config: RunConfig,
        base: Resolved,
        target: Target,
        train: Sequence[Example],
        held_out: Sequence[Example],
    ) -> None:
        self.config, self.base, self.target, self.train, self.held_out = config, base, target, train, held_out
        self.row = longest_row(train)
        assert target.memory is not None
        self.capacity = target.memory

    def faster(self, predicted: predict.Prediction) -> Iterator[str]:
        """Whether keeping the activations fits too."""
        if not self.config.train.gradient_checkpointing:
            return
        config = changed(self.config, "train", gradient_checkpointing=False)
        other = predict.predict(
            config, "", costs_of(config, self.base, self.target), self.target, self.train, self.held_out
        )
        if other.fits and other.memory:
            faster = (
                f", {seconds(other.time.step)} a step instead of {seconds(predicted.time.step)}"
                if (other.time and predicted.time)
                else ""
            )
            yield f"train.gradient_checkpointing: false fits too, {gib(other.memory.needed)}{faster}"

    def smaller(self, costs: Costs, predicted: predict.Prediction) -> Iterator[str]:
        """Smaller forwards first, then recomputation, then fewer bits, then shorter rows."""
        if found := self.budget(costs, predicted.steps.max_tokens):
            yield f"{found}; training comes to it by itself, by halving, and the same rows make a step"
            if not self.config.train.gradient_checkpointing:
                config = changed(self.config, "train", gradient_checkpointing=True)
                if found := self.budget(costs_of(config, self.base, self.target), predicted.steps.max_tokens):
                    yield f"train.gradient_checkpointing: true, with {found}"
            return
        yield f"one row of {predicted.rows['longest']:,} tokens alone needs {gib(predicted.alone or self.alone(costs))}"
        tried: list[tuple[str, str, Any]] = []
        if not self.config.train.gradient_checkpointing:
            tried.append(("train", "gradient_checkpointing", True))
        tried += [("model", "quantization", kind) for kind in self.fewer_bits(costs)]
        config = self.config
        names: list[str] = []
        for group, name, value in tried:
            config = changed(config, group, **{name: value})
            kept = [text for text in names if not text.startswith(f"{group}.{name}:")]
            names = [*kept, f"{group}.{name}: {str(value).lower()}"]
            other = costs_of(config, self.base, self.target)
            words = " and ".join(names)
            if found := self.budget(other, predicted.steps.max_tokens):
                yield f"{words} fits, with {found}"
                return
            yield f"{words} is not enough: one row still needs {gib(self.alone(other))}"
            costs = other
        if longest := self.longest(costs):
            where = " with it" if names else ""
            yield f"data.max_length: {longest} fits{where}; longer rows would be dropped"
        else:
            yield (
                f"the frozen weights alone take {gib(costs.static['weights'])}: take a smaller model or a larger GPU"
                + (", or spread it with model.device_map: auto" if self.target.kind == "cuda" else "")
            )

    def fewer_bits(self, costs: Costs) -> list[str]:
        """The kinds of quantised weights that engine and GPU compute with; a GPU that is not known is taken to."""
        rates = self.target.rates
        fp8 = costs.engine == "decoder" and (rates is None or rates.fp8)
        return ["fp8", "nf4"] if fp8 else ["nf4"]

    def budget(self, costs: Costs, most: int) -> str | None:
        """The largest forward, by halving, that fits: as the setting with its figures."""
        limit = most
        while True:
            steps = predict.count_steps(self.config, costs, self.train, limit)
            evaluations = predict.evaluations_of(costs, self.held_out, limit)
            needed = predict.memory_of(costs, self.target, steps.forwards, evaluations).needed
            if needed <= self.capacity:
                return (
                    f"train.max_tokens_per_forward: {limit} needs {gib(needed)} "
                    f"({steps.forwards_mean:.1f} forwards a step)"
                )
            if limit <= self.row.tokens:
                return None
            limit = max(self.row.tokens, limit // 2)

    def alone(self, costs: Costs) -> int:
        """Bytes that the longest row needs in a forward of its own."""
        return predict.memory_of(costs, self.target, [costs.sizes([self.row])], []).needed

    def longest(self, costs: Costs) -> int | None:
        """The longest row that fits, in steps of 64 tokens, if it is labelled as the longest one is; None for none."""
        if costs.engine != "decoder":  # each try of the generic engine takes seconds
            return None
        row = self.row
        low, high = 0, -(-row.tokens // 64)
        while high - low > 1:
            middle = (low + high) // 2
            tokens = middle * 64
            share = tokens / row.tokens
            shorter = Forward(
                (tokens,), (max(1, tokens - round(row.first * share)),), max(1, round(row.labels * share))
            )
            fits = predict.memory_of(costs, self.target, [shorter], []).needed <= self.capacity
            low, high = (middle, high) if fits else (low, middle)
        return low * 64 or None


def longest_row(train: Sequence[Example]) -> Row:
    """The sizes of the row with the most tokens."""
    return row_of(max(train, key=lambda example: len(example.input_ids)))


def changed(config: RunConfig, group: str, **values: Any) -> RunConfig:
    """The same run with other values in one group of settings."""
    settings = getattr(config, group).model_copy(update=values)
    return config.model_copy(update={group: settings})


def gib(size: float) -> str:
    """19.4 GiB; below one GiB as 310 MiB, below ten MiB as 0.9 MiB."""
    if size >= GIB:
        return f"{size / GIB:,.1f} GiB"
    return f"{size / 2**20:,.{0 if size >= 10 * 2**20 else 1}f} MiB"


def seconds(value: float) -> str:
    """82 ms, 1.3 s, 12 min, 3.1 h."""
    for unit, size, below in (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0)):
        if value < below:
            digits = 0 if value / size >= 10 else 1
            return f"{value / size:,.{digits}f} {unit}"
    return f"{value / 3600:,.1f} h"
