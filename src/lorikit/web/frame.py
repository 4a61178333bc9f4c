"""What all pages share: the language, errors as one message, text of others as text."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from lorikit.errors import LorikitError
from lorikit.web.texts import SETTINGS, TEXTS


@dataclass(frozen=True, slots=True)
class Frame:
    """The working folder and the language: 0 English, 1 Chinese."""

    folder: Path
    language: int

    def __call__(self, key: str, **values: object) -> str:
        """The page's words for `key`."""
        return TEXTS[key][self.language].format(**values)

    def pattern(self, key: str) -> str:
        """The page's words for `key`, with the places for values still in them."""
        return TEXTS[key][self.language]

    def setting(self, name: str) -> str:
        """The label of a setting."""
        return SETTINGS[name][self.language] if name in SETTINGS else name


def guarded(page: Callable[[Frame], None], frame: Frame) -> None:
    """Draw a page; what a user can mend is shown as one message where the page stopped, and a bug in the terminal."""
    try:
        page(frame)
    except LorikitError as error:
        show_error(str(error))
    except Exception:
        traceback.print_exc()
        st.error(frame("again"))


def show_error(text: str) -> None:
    """An error with text of others in it."""
    st.error(plain(text))


def plain(text: str) -> str:
    """`text` for Markdown, which then shows it as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text).replace("\n", "  \n")
