"""Runs: all of the folder in a table, their curves together, and each with its settings and its report."""

from __future__ import annotations

import streamlit as st

from lorikit.config import dump_config
from lorikit.web import run_view
from lorikit.web.charts import runs_chart
from lorikit.web.folder import RUNS
from lorikit.web.frame import Frame, plain, show_error
from lorikit.web.run_view import RunView

_REPORT_HEIGHT = 800  # pixels


def page(frame: Frame) -> None:
    """The whole page."""
    st.title(frame("runs"))
    st.write(plain(frame("runs_intro", folder=frame.folder / RUNS)))
    runs = run_view.runs(frame.folder)
    if not runs:
        st.info(frame("no_runs"))
        return
    st.dataframe([_row(frame, run) for run in runs], hide_index=True, width="stretch")
    drawn = [run for run in runs if run.held_out or run.trained]
    if drawn:
        st.subheader(frame("curves"))
        st.altair_chart(runs_chart(frame, drawn), width="stretch")
    name = st.selectbox(frame("details"), [run.name for run in runs])
    _details(frame, next(run for run in runs if run.name == name))


def _row(frame: Frame, run: RunView) -> dict[str, object]:
    row: dict[str, object] = {frame("run"): run.name, frame("state"): frame(run.state)}
    if run.config:
        rows = run.config.data.train
        row |= {
            frame("base"): run.config.model.name_or_path,
            frame("rows_of"): rows if isinstance(rows, str) else ", ".join(rows),
            frame("rank"): run.config.lora.r,
            frame("rate"): f"{run.config.train.learning_rate:g}",
            frame("epochs"): f"{run.config.train.num_train_epochs:g}",
        }
    row[frame("step")] = run.step
    row[frame("last_loss")] = round(run.trained[-1]["loss"], 4) if run.trained else None
    row[frame("best_loss")] = round(run.best, 4) if run.best is not None else None
    row[frame("tokens_per_second")] = round(run.trained[-1]["tokens_per_second"]) if run.trained else None
    row[frame("verdict")] = run.verdict
    return row


def _details(frame: Frame, run: RunView) -> None:
    with st.expander(frame("settings")):
        if run.config:
            st.code(dump_config(run.config), language="yaml")
        else:
            show_error(frame("unreadable"))
    report = run.path / "report.html"
    st.subheader(frame("report"))
    if not report.is_file():
        st.info(frame("no_report"))
        return
    html = report.read_text(encoding="utf-8", errors="replace")
    st.download_button(frame("download_report"), html, file_name=f"{run.name}.html", mime="text/html")
    st.iframe(html, height=_REPORT_HEIGHT)
