"""The curves and the histogram, as Vega-Lite drawings of plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from lorikit.web.frame import Frame
from lorikit.web.run_view import RunView

Drawing = alt.LayerChart | alt.FacetChart

_TRAINED, _HELD_OUT = "#0b7285", "#d9730d"
_HEIGHT = 260  # pixels


def loss_chart(frame: Frame, trained: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> Drawing:
    """Training and held-out loss over the steps."""
    names = [frame("loss"), frame("held_out_loss")]
    values = [{"step": one["step"], "value": one["loss"], "curve": names[0]} for one in trained]
    values += [{"step": one["step"], "value": one["eval_loss"], "curve": names[1]} for one in held_out]
    return _lines(frame, values, names, [_TRAINED, _HELD_OUT], frame("loss"))


def one_chart(frame: Frame, trained: Sequence[dict[str, Any]], field: str) -> Drawing:
    """One number of metrics.jsonl over the steps."""
    values = [{"step": one["step"], "value": one[field], "curve": frame(field)} for one in trained if field in one]
    return _lines(frame, values, [frame(field)], [_TRAINED], frame(field), legend=False, height=160)


def runs_chart(frame: Frame, runs: Sequence[RunView]) -> Drawing:
    """The losses of several runs: held-out where that is a line, else training."""
    values = [
        {"step": one["step"], "value": one.get("eval_loss", one.get("loss")), "curve": run.name}
        for run in runs
        for one in (run.held_out if len(run.held_out) > 1 else run.trained or run.held_out)
    ]
    return _lines(frame, values, [run.name for run in runs], None, frame("loss"))


def lengths_chart(frame: Frame, lengths: dict[str, Any], max_length: int) -> Drawing:
    """Rows by their length in tokens, with the cut."""
    kept, over = frame("kept"), frame("over")
    values = [
        {
            "low": one["low"] - 0.5,
            "high": one["high"] + 0.5,
            "rows": one["rows"],
            "kind": over if one["low"] > max_length else kept,
        }
        for one in lengths["histogram"]
    ]
    bars = (
        alt.Chart(alt.InlineData(values=values))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X(
                "low:Q",
                title=frame("tokens"),
                bin="binned",
                scale=alt.Scale(zero=False, nice=False),
                axis=alt.Axis(tickMinStep=1, format="d"),
            ),
            x2="high:Q",
            y=alt.Y("rows:Q", title=frame("count_of_rows"), axis=alt.Axis(tickMinStep=1)),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=[kept, over], range=["#2b9e4b", "#dc3545"]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=["low:Q", "high:Q", "rows:Q"],
        )
    )
    layers: list[alt.Chart] = [bars]
    if lengths["min"] <= max_length <= lengths["max"]:
        cut = alt.Chart(alt.InlineData(values=[{"at": max_length + 0.5}]))
        layers.append(cut.mark_rule(color="#dc3545", strokeDash=[5, 4], strokeWidth=2).encode(x="at:Q"))
    return alt.layer(*layers).properties(height=_HEIGHT)


def _lines(
    frame: Frame,
    values: list[dict[str, Any]],
    names: list[str],
    colours: list[str] | None,
    title: str,
    *,
    legend: bool = True,
    height: int = _HEIGHT,
) -> Drawing:
    scale = alt.Scale(domain=names, range=colours) if colours else alt.Scale(domain=names)
    line = (
        alt.Chart(alt.InlineData(values=values))
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=30))
        .encode(
            x=alt.X("step:Q", title=frame("step"), axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=alt.Color("curve:N", scale=scale, legend=alt.Legend(title=None, orient="top") if legend else None),
            tooltip=["curve:N", "step:Q", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    return alt.layer(line).properties(height=height)
