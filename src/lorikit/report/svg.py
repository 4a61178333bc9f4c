"""Curves and bars as inline SVG whose colours are the page's own, so that one drawing serves light and dark.

Written here and not by a plotting library: such a drawing has its colours fixed and its text as outlines, which neither
follow the reader's colour scheme nor can be read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 30
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve: (x, y) points, of which those that are not finite are left out."""

    name: str
    points: Points


def chart(title: str, lines: Sequence[Line], unit: str = "step") -> Markup:
    """The curves over a common x axis; empty where no curve has a point. At most three curves, by class c0 to c2."""
    drawn = [Line(one.name, [p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for one in lines]
    every = [point for one in drawn for point in one.points]
    if not every:
        return Markup("")
    xs, ys = ticks(min(x for x, _ in every), max(x for x, _ in every)), ticks(*_range([y for _, y in every]))
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    across = _scale(low_x, high_x, _LEFT, WIDTH - _RIGHT)
    up = _scale(min(ys[0], *(y for _, y in every)), max(ys[-1], *(y for _, y in every)), HEIGHT - _BOTTOM, _TOP)
    parts = []
    for y in ys:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in (x for x in xs if low_x <= x <= high_x):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(x)}</text>')
    for number, one in enumerate(drawn):
        places = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in one.points)
        parts.append(f'<polyline class="c{number}" points="{places}"/>')
        if len(one.points) < 40:
            parts += [
                f'<circle class="c{number}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>' for x, y in one.points
            ]
    spoken = "; ".join(
        f"{one.name} from {short(one.points[0][1])} to {short(one.points[-1][1])}" for one in drawn if one.points
    )
    return _svg(f"{title} by {unit}: {spoken}", HEIGHT, parts)


def bars(title: str, rows: Sequence[tuple[str, int, bool]]) -> Markup:
    """Horizontal bars: (label, count, whether it lies over the cut)."""
    most = max((count for _, count, _ in rows), default=0)
    if not most:
        return Markup("")
    parts = []
    for place, (label, count, over) in enumerate(rows):
        y = 20 * place
        width = (WIDTH - 170) * count / most
        parts.append(f'<text x="80" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<rect class="{"over" if over else "bar"}" x="88" y="{y + 3}" height="14" width="{width:.1f}"/>')
        parts.append(f'<text x="{94 + width:.1f}" y="{y + 14}">{count:,}</text>')
    return _svg(title, 20 * len(rows) + 4, parts)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover low to high, about `wanted` of them."""
    if high <= low:
        return [low]
    step = next(
        base * 10**power
        for power in range(math.floor(math.log10((high - low) / wanted)), 400)
        for base in (1, 2, 5)
        if base * 10.0**power * wanted >= (high - low)
    )
    first = math.floor(low / step)
    return [number * step for number in range(first, math.ceil(high / step) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 1200 is 1.2k, 0.00012 is 1.2e-4."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the least value to the greatest, from 0 where that is near and wide enough to see one that never changes."""
    low, high = min(values), max(values)
    if 0 < low < high / 2 or low == high > 0:
        low = 0.0
    return low, high


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _svg(spoken: str, height: int, parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(spoken)}">'
    return Markup(f"{head}{''.join(parts)}</svg>")  # noqa: S704 - the parts are numbers and escaped labels
