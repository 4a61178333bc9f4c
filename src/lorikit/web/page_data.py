"""Data: pick or upload a file, see the account of its rows, the findings, the lengths with the cut, the mask in colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import streamlit as st

from lorikit.errors import ConfigError
from lorikit.web import process
from lorikit.web.charts import lengths_chart
from lorikit.web.folder import data_files, inside, save_upload
from lorikit.web.frame import Frame, guarded, plain, show_error

MODEL = "smollm2-135m-instruct"
_SHOWN = 8  # rows with their mask, and places of a finding
_COLOURS = {"error": "red", "warning": "orange", "note": "blue"}


def page(frame: Frame) -> None:
    """The whole page."""
    st.title(frame("data"))
    st.write(frame("data_intro"))
    guarded(_upload, frame)
    files = data_files(frame.folder)
    if st.session_state.get("checked file") not in files:  # nothing chosen yet, or a file that is gone
        st.session_state.pop("checked file", None)
    if not files:
        st.info(frame("no_files"))
        return
    with st.form("check", enter_to_submit=False):
        name = st.selectbox(frame("file"), files, key="checked file")
        left, right = st.columns(2)
        model = left.text_input(frame("model"), MODEL)
        longest = right.number_input(frame("max_length"), min_value=1, value=1024, step=64)
        row = st.text_input(frame("row"))
        if st.form_submit_button(frame("check"), type="primary"):
            st.session_state["asked"] = (name, model.strip(), int(longest), row.strip())
    if asked := st.session_state.get("asked"):
        _show(frame, *asked)


@st.cache_data(show_spinner=False, max_entries=20)
def checked(folder: Path, name: str, model: str, longest: int, row: str, changed: int) -> Any:
    """What `lorikit check` says; `changed` (the file's time, in ns) makes it anew for another content."""
    place = f"./{name}"  # a name may begin with a dash
    options = [f"--model={model}", f"--max-length={longest}", f"--show={_SHOWN}", *([f"--row={row}"] if row else [])]
    return process.ask(folder, ["check", place, *options])


def _upload(frame: Frame) -> None:
    given = st.file_uploader(frame("upload"))
    if given is None:
        return
    if st.session_state.get("upload") != given.file_id:
        st.session_state["saved"] = save_upload(frame.folder, given.name, given.getvalue())
        st.session_state["upload"] = given.file_id
        st.session_state["checked file"] = st.session_state["saved"]
    st.success(plain(frame("uploaded", name=st.session_state["saved"])))


def _show(frame: Frame, name: str | None, model: str, longest: int, row: str) -> None:
    if not name:
        raise ConfigError(frame("choose_file"))
    if not model:
        raise ConfigError(frame("choose_model"))
    changed = inside(frame.folder, name).stat().st_mtime_ns
    with st.spinner(frame("checking")):
        found = checked(frame.folder, name, model, longest, row, changed)
    rows = found["rows"]
    for column, key in zip(st.columns(5), ("read", "trained", "held_out", "dropped", "duplicates"), strict=True):
        column.metric(frame(f"rows_{key}"), f"{rows[key]:,}")
    if found["refusals"]:
        show_error("\n".join([f"{frame('refused')}:", *found["refusals"]]))
    else:
        st.success(frame("usable"))
    _findings(frame, found["findings"])
    if found["lengths"]:
        _lengths(frame, found["lengths"], found["max_length"])
    _mask(frame, found["samples"])


def _findings(frame: Frame, findings: list[dict[str, Any]]) -> None:
    st.subheader(frame("findings"))
    if not findings:
        st.write(frame("no_findings"))
    for one in findings:
        with st.expander(
            f":{_COLOURS[one['severity']]}[{frame(one['severity'])}] {plain(one['title'])} ({one['rows']:,})"
        ):
            for place in one["places"][:_SHOWN]:
                shown = ", ".join(place["rows"][:3]) + (" …" if len(place["rows"]) > 3 else "")
                st.text(f"{shown}: {place['detail']}" if place["detail"] else shown)
            if len(one["places"]) > _SHOWN:
                st.text(frame("more_rows", count=len(one["places"]) - _SHOWN))
            st.caption(plain(one["advice"]))


def _lengths(frame: Frame, lengths: dict[str, Any], cut: int) -> None:
    st.subheader(frame("lengths"))
    over = sum(one["rows"] for one in lengths["histogram"] if one["low"] > cut)
    st.write(frame("lengths_words", **{k: lengths[k] for k in ("min", "max", "median", "p99")}, cut=cut, over=over))
    st.altair_chart(lengths_chart(frame, lengths, cut), width="stretch")


def _mask(frame: Frame, samples: list[dict[str, Any]]) -> None:
    from lorikit.data.view import Sample, Span
    from lorikit.data.view_html import STYLE, Words, samples_html

    st.subheader(frame("mask"))
    rows = [Sample(**{**one, "spans": [Span(**span) for span in one["spans"]]}) for one in samples]
    words = Words(frame("learnt"), frame("read_only"), frame("control"), frame("cut"), frame.pattern("row_tokens"))
    st.html(f'{STYLE}<div class="lorikit">{samples_html(rows, words)}</div>')
