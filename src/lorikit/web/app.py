"""What streamlit runs, once for every look at the page: `streamlit run app.py -- FOLDER`. See `lorikit web`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from lorikit.web import page_compare, page_data, page_runs, page_train
from lorikit.web.frame import Frame, guarded, plain
from lorikit.web.texts import LANGUAGES

_PAGES: dict[str, Callable[[Frame], None]] = {
    "data": page_data.page,
    "train": page_train.page,
    "compare": page_compare.page,
    "runs": page_runs.page,
}


def main(folder: Path) -> None:
    """The head that all pages have, and the one that was chosen.

    The links stand at the top and not at the side: on a phone streamlit's sidebar stays over the page that it leads to.
    """
    st.set_page_config(page_title="Lorikit", layout="wide")
    codes = list(LANGUAGES)
    default = _language(codes)
    frame = Frame(folder, codes.index(st.session_state.get("language", codes[default])))

    def made(name: str) -> st.Page:  # without an icon, which the browser would fetch from a foreign host for its tab
        return st.Page(lambda: guarded(_PAGES[name], frame), title=frame(name), url_path=name, default=name == "data")

    pages = [made(name) for name in _PAGES]
    chosen = st.navigation(pages, position="hidden")
    with st.container(horizontal=True, vertical_alignment="center"):
        for one in pages:
            st.page_link(one, label=one.title)
        st.radio(
            "Language / 语言",
            codes,
            index=default,
            format_func=LANGUAGES.__getitem__,
            horizontal=True,
            label_visibility="collapsed",
            key="language",
        )
    st.caption(f"{frame('folder')}: {plain(str(folder))}")
    chosen.run()


def _language(codes: list[str]) -> int:
    """The browser's language, if it is one of ours."""
    wanted = (st.context.locale or "").partition("-")[0].lower()
    return codes.index(wanted) if wanted in codes else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
