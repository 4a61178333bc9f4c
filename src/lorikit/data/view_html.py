"""The same as `view` shows on a terminal, as HTML for a notebook or a page: account, findings, lengths, rows in colour.

Every text of the data is made visible and escaped; the colours are see-through, so that they suit light and dark pages,
and learnt tokens are underlined as well, for those who do not see the colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from lorikit.data.account import KINDS, DataReport, Lengths
from lorikit.data.visible import visible

if TYPE_CHECKING:
    from lorikit.data.view import Sample, Span

_SHOWN = 5
STYLE = """<style>
.lorikit{line-height:1.5}.lorikit table{border-collapse:collapse;margin:.3em 0}
.lorikit td{padding:.1em 1em .1em 0;text-align:left;border:0;background:none}.lorikit td.n{text-align:right}
.lorikit .row{margin:.6em 0;padding:.5em .8em;border:1px solid rgba(128,128,128,.35);border-radius:6px;
white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:90%}
.lorikit .learnt{background:rgba(43,158,75,.25);text-decoration:underline;text-decoration-color:rgba(43,158,75,.9);
text-underline-offset:.2em}.lorikit .read{opacity:.72}
.lorikit .cut{background:rgba(220,53,69,.22);text-decoration:line-through}
.lorikit .control{border:1px solid rgba(128,128,128,.6);border-radius:4px;padding:0 .2em;margin:0 .1em;font-size:88%}
.lorikit .bar{display:inline-block;height:.75em;background:rgba(43,158,75,.75);min-width:2px}
.lorikit .over .bar{background:rgba(220,53,69,.75)}.lorikit .small{opacity:.75;font-size:90%}
</style>"""


@dataclass(frozen=True, slots=True)
class Words:
    """What stands beside the rows, for pages in other languages."""

    learnt: str = "learnt"
    read: str = "read only"
    control: str = "control token"
    cut: str = "behind max_length"
    size: str = "{tokens:,} tokens, {learnt:,} learnt"


def check_html(report: DataReport, samples: Sequence[Sample]) -> str:
    """All of it in one element."""
    files = ", ".join(visible(file.name) for file in report.files[:_SHOWN])
    refused = "".join(f"<p><b>refused:</b> {_text(line)}</p>" for line in report.refusals)
    notes = "".join(f'<p class="small">{_text(note)}</p>' for note in report.notes)
    lengths = lengths_html(report.lengths, report.max_length) if report.lengths else ""
    parts = [f"<b>{escape(files)}</b>", _account(report), _findings(report), lengths, samples_html(samples)]
    return f'{STYLE}<div class="lorikit">{"".join(parts)}{notes}{refused}</div>'


def samples_html(samples: Sequence[Sample], words: Words | None = None) -> str:
    """Rows with what is learnt of them in colour, under one legend; needs STYLE and the class lorikit around it."""
    rows = [one for one in samples if one.spans]
    if not rows:
        return "".join(f"<p>{_text(one.source)}: {_text(one.fate)}</p>" for one in samples)
    words = words or Words()
    kinds = [("learnt", words.learnt), ("read", words.read), ("control", words.control)]
    if any(span.use == "cut" for one in rows for span in one.spans):
        kinds.append(("cut", words.cut))
    legend = " ".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in kinds)
    return f"<p>{legend}</p>" + "".join(_row(one, words) for one in samples)


def lengths_html(lengths: Lengths, max_length: int) -> str:
    """One bar for each bin, those over the cut in another colour."""
    most = max(one.rows for one in lengths.histogram)
    lines = (
        f'<tr class="{"over" if one.low > max_length else ""}"><td class="n">{one.low}–{one.high}</td>'
        f'<td class="n">{one.rows:,}</td><td><span class="bar" style="width:{one.rows / most * 14:.2f}em"></span></td></tr>'
        for one in lengths.histogram
    )
    return (
        f"<p>tokens a row: {lengths.min} to {lengths.max}, median {lengths.median}, 99 % up to {lengths.p99}; "
        f"max_length is {max_length}</p><table>{''.join(lines)}</table>"
    )


def _account(report: DataReport) -> str:
    rows: list[tuple[str, int]] = [("trained", report.num_trained), ("held out", len(report.held_out))]
    rows += [(KINDS[kind], len(dropped)) for kind, dropped in report.dropped.items() if dropped]
    rows += [("duplicates removed", len(report.duplicates))]
    lines = "".join(f'<tr><td>{name}</td><td class="n">{count:,}</td></tr>' for name, count in rows)
    total = f'<tr><td><b>= rows read</b></td><td class="n"><b>{report.num_rows:,}</b></td></tr>'
    return f"<table>{lines}{total}</table>"


def _findings(report: DataReport) -> str:
    if not report.findings:
        return "<p>no findings</p>"
    return "".join(
        f"<details><summary>{one.severity}: {_text(one.headline)}</summary>"
        f'<div class="small">{_lines(str(place) for place in one.places[:_SHOWN])}{_more(len(one.places))}'
        f"→ {_text(one.advice)}</div></details>"
        for one in report.findings
    )


def _row(one: Sample, words: Words) -> str:
    head = f"<b>{_text(one.source)}</b> {_text(one.fate)}"
    if not one.spans:
        return f"<p>{head}</p>"
    size = f'<span class="small">{escape(words.size.format(tokens=one.num_tokens, learnt=one.num_learnt))}</span>'
    return f'<div>{head} {size}</div><div class="row">{"".join(map(_span, one.spans))}</div>'


def _span(span: Span) -> str:
    kind = f"{span.use} control" if span.control else span.use
    # a line break that is learnt has to be seen to be so
    text = escape(visible(span.text, keep="\n")).replace("\n", "↵\n")
    return f'<span class="{kind}">{text}</span>'


def _lines(texts: Iterable[str]) -> str:
    return "".join(f"<div>{_text(text)}</div>" for text in texts)


def _more(count: int) -> str:
    return f"<div>and {count - _SHOWN:,} more</div>" if count > _SHOWN else ""


def _text(text: str) -> str:
    return escape(visible(text, keep="\n"))
