"""What a notebook shows: rows in HTML that cannot be forged, the curve of a run."""

import html
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import tokenizers
from lorikit.config import load_config
from lorikit.data.encode import Encoder
from lorikit.data.view import check
from lorikit.train.notebook import LiveCurve, choose_report, curve_svg, smooth
from lorikit.train.progress import Report

TAGS = {"style", "div", "b", "table", "tr", "td", "p", "span", "details", "summary"}


class Elements(HTMLParser):
    """Tags in order, and texts by the class around them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.by_class, self.attributes = [], {}, set()
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(dict(attrs).get("class", ""))

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        self.by_class.setdefault(self._open[-1] if self._open else "", []).append(data)


def checked(folder, rows, **data):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        model={"name_or_path": "m"},
        data={"train": str(file), **data},
        train={"output_dir": "x"},
        eval={"eval_size": 0},
    )
    return check([file], config, Encoder(tokenizers()["llama3"], config.data), show=10)


def test_the_mask_marks_what_is_learnt_what_is_read_and_control_tokens(tmp_path):
    elements = Elements(checked(tmp_path, [{"instruction": "who?", "output": "me"}])._repr_html_())
    assert elements.by_class["learnt"][-1] == "me"
    assert elements.by_class["learnt control"] == ["<|eot_id|>"]
    assert "who?" in "".join(elements.by_class["read"])
    assert "<|begin_of_text|>" in elements.by_class["read control"]


def test_rows_behind_the_cut_and_refused_ones_are_told(tmp_path):
    rows = [
        {"instruction": "who? " * 40, "output": "me"},
        {"instruction": "a", "output": ""},
        {"instruction": "b", "output": "c"},
    ]
    result = checked(tmp_path, rows, max_length=30)
    text = result._repr_html_()
    assert "<b>refused:</b>" in text
    assert "rows.jsonl:2: output is empty" in text
    assert "max_length is 30" in text
    assert 'class="over"' in text


@given(st.text(min_size=1), st.text(min_size=1))
def test_no_text_of_a_row_becomes_markup(tmp_path_factory, question, answer):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"instruction": f"</div><script>{question}", "output": f'"><img onerror=x src={answer}'}]
    elements = Elements(checked(folder, rows)._repr_html_())
    assert set(elements.tags) <= TAGS
    assert elements.attributes <= {"class", "style"}


def test_outside_of_a_notebook_a_run_reports_to_the_terminal():
    assert type(choose_report()) is Report


def test_the_curve_is_drawn_from_steps_and_lines(monkeypatch):
    pytest.importorskip("IPython")
    curve = LiveCurve()
    assert curve_svg([], [], 10) == ""
    curve.start(4, 0)
    for step, loss in enumerate((3.0, 2.0, 1.5, 1.0), start=1):
        curve.step(step, step / 4, loss, 1234.0, 2**30)
    curve.line({"step": 4, "eval_loss": 1.25, "answers": [{"prompt": "<b>", "answer": "<i>"}]})
    text = curve.html()
    drawing = ElementTree.fromstring(text[: text.index("</svg>") + 6])
    lines = [one.get("points").split() for one in drawing.iter("polyline")]
    assert [len(points) for points in lines] == [4, 4, 1]
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights)  # SVG counts downwards, and the loss falls
    assert "step 4 of 4, epoch 1.00, loss 1.000, 1,234 tokens/s, 1.0 GiB" in text
    assert html.escape("<b> → <i>") in text


@given(st.lists(st.floats(0, 100), max_size=40), st.integers(1, 12))
def test_the_thick_line_is_the_mean_of_the_last_points(losses, window):
    points = list(enumerate(losses))
    for (at, _), (step, mean) in zip(points, smooth(points, window), strict=True):
        last = losses[max(0, at + 1 - window) : at + 1]
        assert step == at
        assert mean == pytest.approx(sum(last) / len(last), abs=1e-9)
