"""Train: a form, the plan, a start, and how the run gets on; stop and go on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import streamlit as st
import yaml

from lorikit.config import RunConfig
from lorikit.errors import ConfigError
from lorikit.web import process, run_view
from lorikit.web.charts import loss_chart, one_chart
from lorikit.web.folder import RUNS, data_files, inside, run_name
from lorikit.web.form import first_fields, other_fields, settings_of
from lorikit.web.frame import Frame, guarded, plain, show_error
from lorikit.web.page_data import MODEL
from lorikit.web.run_view import RunView

_EVERY = 2.0  # seconds between two looks at a run


def page(frame: Frame) -> None:
    """The whole page."""
    st.title(frame("train"))
    st.write(frame("train_intro"))
    guarded(_new, frame)
    st.subheader(frame("progress"))
    names = [run.name for run in run_view.runs(frame.folder)]
    if not names:
        st.info(frame("no_runs"))
        return
    chosen = st.session_state.get("followed")
    name = st.selectbox(frame("run"), names, index=names.index(chosen) if chosen in names else 0)
    st.session_state["followed"] = name
    running = run_view.state_of(frame.folder, name) == "running"
    st.fragment(_follow, run_every=_EVERY if running else None)(frame, name, running)


def _new(frame: Frame) -> None:
    files = data_files(frame.folder)
    if not files:
        st.info(frame("no_files"))
        return
    st.subheader(frame("new_run"))
    with st.form("train", enter_to_submit=False):
        left, middle, right = st.columns(3)
        name = left.text_input(frame("name"), "mine")
        rows = middle.selectbox(frame("rows_file"), files)
        model = right.text_input(frame("model"), MODEL, key="train model")
        entered = first_fields(frame)
        with st.expander(frame("all_settings")):
            st.caption(frame("all_words"))
            entered |= other_fields()
        with st.container(horizontal=True):
            start = st.form_submit_button(frame("start"), type="primary")
            plan = st.form_submit_button(frame("plan"))
    if not plan and not start:
        return
    if not model.strip():
        raise ConfigError(frame("choose_model"))
    run = run_name(name.strip())
    inside(frame.folder, rows)
    own = {"model.name_or_path": model, "data.train": rows, "train.output_dir": f"{RUNS}/{run}"}
    config, groups = settings_of(own | entered)
    if plan:
        _plan(frame, config, groups)
    else:
        run_view.write_settings(frame.folder, run, groups)
        run_view.train(frame.folder, run)
        st.session_state["followed"] = run
        st.success(plain(frame("started", name=run)))


def _plan(frame: Frame, config: RunConfig, groups: dict[str, Any]) -> None:
    with st.spinner(frame("planning")), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(groups, allow_unicode=True), encoding="utf-8")
        found = process.ask(frame.folder, ["plan", str(file)])
    memory, time = found["memory"], found["time"]
    need = f"{memory['needed'] / 2**30:.1f} GiB" if memory else frame("unknown")
    took = duration(time["total"]) if time else frame("unknown")
    cells = {
        "planned_steps": f"{found['steps']['count']:,}",
        "planned_memory": need,
        "planned_time": took,
        "planned_adapter": f"{found['adapter_parameters'] / 1e6:.2f} M",
    }
    for column, (key, value) in zip(st.columns(4), cells.items(), strict=True):
        column.metric(frame(key), value)
    rows = found["rows"]
    words = frame(
        "plan_words",
        engine=found["engine"],
        device=found["device"],
        dtype=found["dtype"],
        rows=f"{rows['train']:,}",
        tokens=f"{rows['tokens']:,}",
    )
    st.caption(plain(words))
    if found["fits"] is not None:
        (st.success if found["fits"] else st.error)(frame("fits" if found["fits"] else "fits_not"))
    for text in [*found["advice"], *found["notes"]]:
        st.write(plain(text))


def _follow(frame: Frame, name: str, was_running: bool) -> None:
    """How the run is now; drawn again and again while it runs."""
    run = run_view.view(frame.folder, name)
    if was_running and run.state != "running":
        st.rerun()  # the page stops looking, and offers what can be done now
    st.markdown(f"**{plain(name)}** · {frame(run.state)} · {_progress(frame, run)}")
    if run.steps:
        st.progress(min(1.0, run.step / run.steps))
    guarded(lambda frame: _buttons(frame, run), frame)
    if run.trained or run.held_out:
        st.altair_chart(loss_chart(frame, run.trained, run.held_out), width="stretch")
    if len(run.trained) > 1:
        with st.expander(frame("more_curves")):
            for field in ("learning_rate", "grad_norm", "tokens_per_second"):
                st.altair_chart(one_chart(frame, run.trained, field), width="stretch")
    said = process.log_tail(run_view.note(frame.folder, name))
    failed = run.state == "stopped" and "lorikit: " in said
    if failed:
        show_error(process.complaint(said))
    if said:
        with st.expander(frame("said")):
            st.code(said, language=None)


def _progress(frame: Frame, run: RunView) -> str:
    if run.state == "running" and not run.step and not run.steps:
        return frame("starting")
    return frame("step_of", step=run.step, steps=run.steps) if run.steps else frame("step_only", step=run.step)


def _buttons(frame: Frame, run: RunView) -> None:
    note = run_view.note(frame.folder, run.name)
    if run.state == "running" and process.running(note):
        if st.button(frame("stop")):
            process.stop(note)
            st.session_state["stopping"] = run.name
        if st.session_state.get("stopping") == run.name:
            st.info(frame("stopping"))
    elif run.state == "stopped" and st.button(frame("resume")):
        st.session_state.pop("stopping", None)
        run_view.train(frame.folder, run.name)
        st.rerun()


def duration(seconds: float) -> str:
    """1:02:03"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
