"""Compare: one question to several models at once, answers side by side as they come, and a blind vote on two of them."""

from __future__ import annotations

import queue
import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import streamlit as st

from lorikit.errors import ConfigError, LorikitError, ModelError
from lorikit.web import client, process, run_view, votes
from lorikit.web.folder import RUNS
from lorikit.web.frame import Frame, guarded, plain, show_error

_NOTE = ".server.json"
_LOADING = 180  # seconds that a server may take to load its model
_MOST = 4  # answers beside each other


def page(frame: Frame) -> None:
    """The whole page."""
    st.title(frame("compare"))
    st.write(frame("compare_intro"))
    sources = {frame("own_server"): _own_server, frame("other_server"): _other_server}
    picked = st.radio(frame("source"), list(sources), horizontal=True)
    url = sources[picked](frame)
    if not url:
        return
    names = client.models(url)
    st.caption(plain(frame("server_at", url=url)))
    _question(frame, url, names)
    if "compared" in st.session_state:
        _answers(frame, st.session_state["compared"])


def _other_server(frame: Frame) -> str | None:
    # a field with a key is forgotten with its page, and one whose default changes loses what was typed
    st.session_state.setdefault("server address", st.session_state.get("server url", ""))
    url = st.text_input(frame("address"), placeholder="http://127.0.0.1:8000", key="server address")
    if st.button(frame("connect")):
        st.session_state.pop("server url", None)
        st.session_state.pop("compared", None)
        st.session_state["server url"] = client.check_url(url)
    return st.session_state.get("server url")


def _own_server(frame: Frame) -> str | None:
    """The address of the server of this folder's runs, if it runs."""
    note = frame.folder / RUNS / _NOTE
    started = process.running(note)
    if started:
        if st.button(frame("stop_server")):
            process.stop(note)
            st.session_state.pop("compared", None)
            _wait_until_gone(note)
            st.rerun()
        return f"http://127.0.0.1:{started.command[-1]}"
    ready = [run.name for run in run_view.runs(frame.folder) if _can_answer(run.path)]
    if not ready:
        st.info(frame("none_finished"))
        return None
    chosen = st.multiselect(frame("choose_runs"), ready, default=ready[:1])
    if st.button(frame("start_server"), disabled=not chosen):
        port = _free_port()
        process.start(frame.folder, ["serve", *(f"{RUNS}/{name}" for name in chosen), "--port", str(port)], note)
        with st.spinner(frame("loading")):
            _wait_for(frame, f"http://127.0.0.1:{port}", note)
        st.rerun()
    return None


def _can_answer(run: Path) -> bool:
    return (run / "adapter").is_dir() or any(run.glob("checkpoint-*"))


def _wait_for(frame: Frame, url: str, note: Path) -> None:
    """Until the server lists its models. ModelError with its own words if it ends."""
    until = time.monotonic() + _LOADING
    while time.monotonic() < until:
        if process.running(note) is None:
            raise ModelError(frame("server_gone", why=process.complaint(process.log_tail(note)) or "?"))
        try:
            client.models(url)
        except ModelError:
            time.sleep(0.5)
        else:
            return
    raise ModelError(frame("server_slow"))


def _wait_until_gone(note: Path) -> None:
    until = time.monotonic() + 15
    while process.running(note) and time.monotonic() < until:
        time.sleep(0.2)


def _free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _question(frame: Frame, url: str, names: list[str]) -> None:
    with st.form("ask", enter_to_submit=False):
        chosen = st.multiselect(frame("models"), names, default=names[:2])
        prompt = st.text_area(frame("prompt"), height=100)
        left, middle, right = st.columns(3)
        most = left.number_input(frame("max_tokens"), min_value=1, max_value=4096, value=128)
        temperature = middle.number_input(frame("temperature"), min_value=0.0, max_value=2.0, value=0.5, step=0.1)
        greedy = right.toggle(frame("greedy"), value=True)
        blind = right.toggle(frame("blind"))
        asked = st.form_submit_button(frame("ask"), type="primary")
    if asked:
        st.session_state.pop("compared", None)
        guarded(lambda frame: _ask(frame, url, chosen, prompt, blind, most, 0.0 if greedy else temperature), frame)


def _ask(frame: Frame, url: str, chosen: list[str], prompt: str, blind: bool, most: int, temperature: float) -> None:
    if not prompt.strip():
        raise ConfigError(frame("no_prompt"))
    if blind and len(chosen) != 2:
        raise ConfigError(frame("choose_two"))
    if not 1 <= len(chosen) <= _MOST:
        raise ConfigError(frame("choose_models"))
    order = random.sample(chosen, len(chosen)) if blind else chosen
    titles = ["A", "B"] if blind else order
    texts, errors = _stream(frame, url, order, titles, prompt, {"max_tokens": most, "temperature": temperature})
    st.session_state["compared"] = {
        "prompt": prompt,
        "models": order,
        "titles": titles,
        "texts": texts,
        "errors": errors,
        "blind": blind,
        "voted": "",
    }
    st.rerun()


def _stream(
    frame: Frame, url: str, models: list[str], titles: list[str], prompt: str, sampling: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Draws the answers as they come; the whole answers, and what went wrong with each."""
    pieces: queue.Queue[tuple[int, str | LorikitError | None]] = queue.Queue()
    left = threading.Event()  # the page was left or drawn anew: hang up

    def listen(number: int, model: str) -> None:
        try:
            with closing(client.answer(url, model, [{"role": "user", "content": prompt}], sampling)) as stream:  # type: ignore[type-var]
                for piece in stream:
                    pieces.put((number, piece))
                    if left.is_set():
                        return
        except LorikitError as error:
            pieces.put((number, error))
        finally:
            pieces.put((number, None))

    places = _columns(titles)
    texts, errors, open_ones = [""] * len(models), [""] * len(models), len(models)
    for number, model in enumerate(models):
        threading.Thread(target=listen, args=(number, model), daemon=True).start()
    try:
        while open_ones:
            number, piece = pieces.get()
            if piece is None:
                open_ones -= 1
            elif isinstance(piece, LorikitError):
                errors[number] = str(piece)
            else:
                texts[number] += piece
                places[number].text(texts[number])
    finally:
        left.set()
    return texts, errors


def _columns(titles: Sequence[str]) -> list[Any]:
    places = []
    for column, title in zip(st.columns(len(titles)), titles, strict=True):
        with column.container(border=True):
            st.markdown(f"**{plain(title)}**")
            places.append(st.empty())
    return places


def _answers(frame: Frame, compared: dict[str, Any]) -> None:
    """What was answered, and the vote."""
    st.markdown(f"> {plain(compared['prompt'])}")
    titles = compared["titles"]
    if compared["voted"]:
        titles = [f"{title}: {model}" for title, model in zip(titles, compared["models"], strict=True)]
    for place, text, error in zip(_columns(titles), compared["texts"], compared["errors"], strict=True):
        if error:
            place.error(plain(error))
        else:
            place.text(text or frame("empty_answer"))
    if compared["voted"]:
        st.success(plain(compared["voted"]))
    elif compared["blind"] and not any(compared["errors"]):
        _vote(frame, compared)
    _tally(frame, compared["models"])


def _vote(frame: Frame, compared: dict[str, Any]) -> None:
    a, b = compared["models"]
    for column, key, winner in zip(st.columns(3), ("vote_a", "vote_b", "vote_tie"), (a, b, ""), strict=True):
        if column.button(frame(key), width="stretch"):
            vote = votes.new(compared["prompt"], (a, b), tuple(compared["texts"]), winner)
            place = _place_of_votes(frame.folder, (a, b))
            try:
                votes.keep(place, vote)
            except OSError as error:
                show_error(frame("votes_unkept", why=error.strerror or error))
                return
            file = (place / votes.FILE).relative_to(frame.folder)
            compared["voted"] = frame("voted", file=file, a=a, b=b)
            st.rerun()


def _tally(frame: Frame, models: Sequence[str]) -> None:
    counts = votes.tally(_place_of_votes(frame.folder, models))
    if counts:
        words = (f"{model or frame('vote_tie')}: {count}" for model, count in counts.most_common())
        st.caption(plain(f"{frame('votes')}: {', '.join(words)}"))


def _place_of_votes(folder: Path, models: Sequence[str]) -> Path:
    """The run that one of the models is, or the working folder if they are others."""
    for model in models:
        run = folder / RUNS / Path(model).name
        if (run / "config.yaml").is_file():
            return run
    return folder
