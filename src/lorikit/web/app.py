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
    """The frame of all pages, and the one that was chosen."""
    st.set_page_config(page_title="Lorikit", layout="wide")
    codes = list(LANGUAGES)
    with st.sidebar:
        picked = st.radio(
            "Language / 语言",
            codes,
            index=_language(codes),
            format_func=LANGUAGES.__getitem__,
            horizontal=True,
            key="language",
        )
    frame = Frame(folder, codes.index(picked))

    def made(name: str) -> st.Page:  # without an icon, which the browser would fetch from a foreign host for its tab
        return st.Page(lambda: guarded(_PAGES[name], frame), title=frame(name), url_path=name, default=name == "data")

    chosen = st.navigation([made(name) for name in _PAGES])
    with st.sidebar:
        st.caption(f"{frame('folder')}: {plain(str(folder))}")
    chosen.run()


def _language(codes: list[str]) -> int:
    """The browser's language, if it is one of ours."""
    wanted = (st.context.locale or "").partition("-")[0].lower()
    return codes.index(wanted) if wanted in codes else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
