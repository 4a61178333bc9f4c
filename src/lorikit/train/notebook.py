"""A run in a notebook: the losses as one drawing that grows in its cell, instead of a progress line.

The drawing is SVG made here, with the colours of the page around it: no library of plots, no network, light and dark.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console

from lorikit.train.metrics import Record
from lorikit.train.progress import Report

_WIDTH, _HEIGHT = 640, 220  # in SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 26  # room for the axes
_BETWEEN = 0.5  # seconds between drawings, so that a fast run is not slowed down by its own picture


def choose_report() -> Report:
    """A LiveCurve where a notebook runs this, else the terminal's."""
    return LiveCurve() if in_notebook() else Report()


def in_notebook() -> bool:
    """Whether the code runs in the kernel of a notebook."""
    get = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get is not None and hasattr(get(), "kernel")


class LiveCurve(Report):
    """A Report that draws training and held-out loss, and under them the step, the speed and the time that is left."""

    def __init__(self) -> None:
        super().__init__(Console(stderr=True, highlight=False, force_jupyter=False))
        self.trained: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self._messages: list[str] = []
        self._status = ""
        self._total = 0
        self._handle: Any = None
        self._drawn = 0.0

    def say(self, text: str) -> None:
        """One message, kept under the drawing."""
        self._messages.append(text)
        self._draw(now=True)

    def start(self, num_steps: int, done: int) -> None:
        """The loop begins."""
        self._total = num_steps
        self._status = f"step {done} of {num_steps}"
        self._draw(now=True)

    def step(self, step: int, epoch: float, loss: float, tokens_per_second: float, memory: int) -> None:
        """A step is done: one point of the curve."""
        self.trained.append((step, loss))
        self._status = (
            f"step {step} of {self._total}, epoch {epoch:.2f}, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, "
            f"{memory / 2**30:.1f} GiB"
        )
        self._draw()

    def line(self, record: Record) -> None:
        """A line of metrics.jsonl: of these the held-out losses are drawn, and answers are kept as messages."""
        if "eval_loss" in record:
            self.held_out.append((record["step"], record["eval_loss"]))
        self._messages += [f"{one['prompt']} → {one['answer']}" for one in record.get("answers", ())]
        self._draw(now="eval_loss" in record)

    def stop(self) -> None:
        """The loop is over: the last drawing."""
        self._draw(now=True)

    def html(self) -> str:
        """What the cell shows."""
        status = f"<div><b>{escape(self._status)}</b></div>" if self._status else ""
        shown = "".join(f"<div>{escape(text)}</div>" for text in self._messages)
        messages = f'<div style="opacity:.75;font-size:90%;white-space:pre-wrap">{shown}</div>'
        return f"{curve_svg(self.trained, self.held_out, self._total)}{status}{messages}"

    def _draw(self, now: bool = False) -> None:
        from IPython.display import HTML, display

        if not now and time.monotonic() - self._drawn < _BETWEEN:
            return
        if self._handle is None:
            self._handle = display(HTML(self.html()), display_id=True)
        else:
            self._handle.update(HTML(self.html()))
        self._drawn = time.monotonic()


def curve_svg(trained: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], last: int) -> str:
    """The two losses over steps 0 to `last`, as an SVG that scales with the page; empty before the first point.

    Single steps are noisy: they are drawn thin, their running mean thick.
    """
    points = [*trained, *held_out]
    if not points:
        return ""
    last = max(last, 1, *(step for step, _ in points))
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(point: tuple[int, float]) -> str:
        x = _LEFT + point[0] / last * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - point[1]) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    def line(points: Sequence[tuple[int, float]], style: str) -> str:
        return f'<polyline points="{" ".join(map(place, points))}" fill="none" {style}/>'

    ticks = "".join(
        f'<text x="{_LEFT - 6}" y="{float(place((0, loss)).split(",")[1]) + 4}" text-anchor="end">{loss:.2f}</text>'
        for loss in (low, (low + high) / 2, high)
    )
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="4" fill="#d9730d"><title>held-out loss {loss:.4f}, step {step}</title></circle>'
        for step, loss in held_out
        for x, y in [place((step, loss)).split(",")]
    )
    frame = f"M{_LEFT},{_TOP} V{_HEIGHT - _BOTTOM} H{_WIDTH - _RIGHT}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss by step" style="width:100%;max-width:{_WIDTH}px" '
        f'font-family="inherit" font-size="12" fill="currentColor"><path d="{frame}" fill="none" stroke="currentColor" '
        f'opacity=".4"/>{ticks}<text x="{_LEFT}" y="{_HEIGHT - 8}">0</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">step {last}</text>'
        f"{line(trained, _THIN)}{line(smooth(trained), _THICK)}{line(held_out, _DASHED)}{dots}{_LEGEND}</svg>"
    )


def smooth(points: Sequence[tuple[int, float]], window: int = 10) -> list[tuple[int, float]]:
    """Each point with the mean of itself and up to `window` - 1 points before it."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    return [
        (step, (sums[at + 1] - sums[max(0, at + 1 - window)]) / min(at + 1, window))
        for at, (step, _) in enumerate(points)
    ]


_THIN = 'stroke="#0b7285" stroke-width="1" opacity=".35"'
_THICK = 'stroke="#0b7285" stroke-width="2.5"'
_DASHED = 'stroke="#d9730d" stroke-width="2" stroke-dasharray="5 4"'
_LEGEND = (
    f'<g transform="translate({_WIDTH - 190},{_TOP + 4})"><path d="M0,0 h22" {_THICK}/>'
    f'<text x="28" y="4">loss, mean of 10 steps</text>'
    f'<path d="M0,18 h22" {_DASHED}/><text x="28" y="22">held-out loss</text></g>'
)
