"""What a person calls from Python: the verbs of the command line, with settings and prompts as one writes them.

    config = lorikit.load_config("run.yaml")
    lorikit.check(config)                             # what becomes of every row, and what of it is learnt
    run = lorikit.train(config)
    session = lorikit.open_run(run)
    lorikit.generate(session, ["Who are you?"])[0].text

A prompt is a text, or a list of turns: {"role": ..., "content": ...} or Message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikit.config import RunConfig
from lorikit.data.encode import Encoder
from lorikit.data.values import Message
from lorikit.data.view import Check
from lorikit.data.view import check as check_rows
from lorikit.hub import resolve_data, resolve_model
from lorikit.infer import chat as terminal
from lorikit.infer import generate as answering
from lorikit.infer.prompts import conversation_of
from lorikit.model.engine import Sampling
from lorikit.model.load import load_tokenizer, stop_ids

if TYPE_CHECKING:
    from lorikit.infer.session import Session

Prompt = str | Sequence[Message | Mapping[str, Any]]


def check(config: RunConfig, *, show: int = 3, row: str | None = None) -> Check:
    """What becomes of every row of the run's data, and the first `show` rows (or `row`, a file:line) token by token.

    Shows itself in a notebook, with the learnt tokens in colour; `lorikit.data.view.render` shows it on a terminal. What
    training would refuse is in its `report.refusals`. Raises DataError for files without rows, ModelError, ConfigError.
    """

    def find(names: str | list[str]) -> list[Path]:
        names = [names] if isinstance(names, str) else names
        return [resolve_data(name, hub=config.model.hub).path for name in names]

    base = resolve_model(config.model.name_or_path, revision=config.model.revision, hub=config.model.hub)
    tokenizer = load_tokenizer(base.path, trust_remote_code=config.model.trust_remote_code)
    encoder = Encoder(tokenizer, config.data, stop_ids(base.path))
    held_out = find(config.eval.data) if config.eval.data else None
    return check_rows(find(config.data.train), config, encoder, eval_paths=held_out, show=show, row=row)


def generate(
    session: Session, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None, *, base: bool = False
) -> list[answering.Answer]:
    """An Answer to each prompt, in their order; with `base` by the base model alone.

    One text, or one list of turns, counts as one prompt. Sampling is the tutorial's by default; Sampling(temperature=0,
    repetition_penalty=1) always gives the same answer. Raises DataError for prompts that are none or too long, ConfigError
    for impossible sampling values.
    """
    conversations = [conversation_of(prompt) for prompt in _as_list(prompts)]
    with _of(session, base):
        return answering.answer(session, conversations, sampling or Sampling())


def stream(session: Session, prompt: Prompt, sampling: Sampling | None = None) -> answering.Stream:
    """The answer to one prompt in pieces of text, as they come; the rest as `generate`."""
    return answering.stream(session, conversation_of(prompt), sampling or Sampling())


def chat(session: Session, sampling: Sampling | None = None) -> None:
    """The chat of `lorikit chat`, in this terminal."""
    terminal.chat(session, sampling or Sampling())


def _of(session: Session, base: bool) -> AbstractContextManager[None]:
    return session.engine.without_adapter() if base else nullcontext()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Message | Mapping)):
        return [prompts]  # type: ignore[list-item]  # by its first element it is one conversation
    return list(prompts)  # type: ignore[arg-type]
