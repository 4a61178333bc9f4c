"""A Modelfile for Ollama beside a merged model: the chat template as Go's text/template, stop strings and sampling.

Ollama does not read Jinja. A chat template that frames every turn of a role alike is a few constant texts:

    head | system_head system_pre S system_post     user_pre U user_post     assistant_pre A assistant_post ...  generate

They are found by rendering short conversations, and put together again for longer ones to see that they are all there is
to it; a template that does more is refused. BOS is left out: Ollama puts it in front by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorikit.data.values import Message
from lorikit.errors import ModelError
from lorikit.model.engine import Sampling

if TYPE_CHECKING:
    from pathlib import Path

    from lorikit.data.encode import Encoder

MODELFILE = "Modelfile"
_S, _U, _A, _V = (f"\uf8ff{letter}\uf8ff" for letter in "SUAV")


@dataclass(frozen=True, slots=True)
class Layout:
    """The constant texts around turns. `head` opens a conversation without a system turn, `system_head` one with it."""

    head: str
    system_head: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generate: str

    def render(self, messages: list[Message]) -> str:
        """A conversation up to the opening of the next answer."""
        has_system = bool(messages) and messages[0].role == "system"
        frames = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = [frames[m.role][0] + m.content + frames[m.role][1] for m in messages]
        return (self.system_head if has_system else self.head) + "".join(turns) + self.generate

    def go_template(self) -> str:
        """The same in Go's text/template, with Ollama's variables."""
        turns = "".join(
            f'{{{{ {"else if" if role != "system" else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in (("system", self.system), ("user", self.user), ("assistant", self.assistant))
        )
        heads = f"{{{{ if .System }}}}{self.system_head}{{{{ else }}}}{self.head}{{{{ end }}}}"
        return f"{heads}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.generate}"


def layout_of(encoder: Encoder) -> Layout:
    """The layout of a run's chat template; ModelError for one that does more than to frame turns."""
    user, system = Message("user", _U), Message("system", _S)
    asked = encoder.render([user])
    opened = encoder.render([user], generate=True)
    answered = encoder.render([user, Message("assistant", _A)])
    longer = encoder.render([user, Message("assistant", _A), Message("user", _V)])
    told = encoder.render([system, user])
    try:
        generate = _after(opened, asked)
        before_user, user_post = asked.split(_U)
        assistant_pre = _after(longer.split(_U)[1].split(_A)[0], user_post)
        assistant_post = answered.split(_A)[1]
        user_pre = _after(longer.split(_A)[1].split(_V)[0], assistant_post)
        before_system, rest = told.split(_S)
        system_post = _before(rest.split(_U)[0], user_pre)
        head = _before(before_user, user_pre)
    except ValueError:
        raise _refusal("frames its turns in more than one way") from None
    # ChatML models name <|im_start|>, which opens every turn, their BOS; nobody puts that in front of a conversation.
    bos = str(encoder.tokenizer.bos_token) if encoder.text_ids("") else ""
    bos = bos if before_system.startswith(bos) and head.startswith(bos) else ""
    layout = Layout(
        head.removeprefix(bos), "", (before_system.removeprefix(bos), system_post), (user_pre, user_post),
        (assistant_pre, assistant_post), generate,
    )  # fmt: skip
    _check(layout, encoder, bos)
    return layout


def modelfile(encoder: Encoder) -> str:
    """The Modelfile of the model in the same folder. ModelError where its template cannot be said in Ollama's."""
    template = layout_of(encoder).go_template()
    own = Sampling()
    stops = [str(encoder.tokenizer.convert_ids_to_tokens(i)) for i in sorted(encoder.stop_ids)]
    lines = ["FROM .", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{text}"' for text in stops if '"' not in text]
    lines += [f"PARAMETER temperature {own.temperature:g}", f"PARAMETER top_p {own.top_p:g}"]
    lines += [f"PARAMETER repeat_penalty {own.repetition_penalty:g}"]
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, encoder: Encoder) -> None:
    """Into the folder of a merged model."""
    (folder / MODELFILE).write_text(modelfile(encoder), encoding="utf-8")


def _check(layout: Layout, encoder: Encoder, bos: str) -> None:
    """ModelError unless the layout renders longer conversations as the template does, and Go can hold its texts."""
    turns = [
        Message("system", "Be kind."), Message("user", "One?"), Message("assistant", "Two."), Message("user", "Three?"),
        Message("assistant", "<think>\nHm.\n</think>\n\nFour."), Message("user", "Five?"),
    ]  # fmt: skip
    for start, end in ((1, 2), (0, 2), (1, 4), (0, 4), (1, 6), (0, 6)):
        if bos + layout.render(turns[start:end]) != encoder.render(turns[start:end], generate=True):
            raise _refusal(
                "renders earlier turns in another way than the last one, or looks at what they say (such as <think>)"
            )
    if any(mark in layout.go_template().replace("{{ ", "").replace(" }}", "") for mark in ("{{", "}}", '"""')):
        raise _refusal("holds braces or quotes that a Modelfile cannot")


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"the chat template {what}, which Ollama's cannot say: take lorikit merge, and write TEMPLATE in a Modelfile yourself"
    )


def _after(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ValueError
    return text[len(prefix) :]


def _before(text: str, suffix: str) -> str:
    if not text.endswith(suffix):
        raise ValueError
    return text[: len(text) - len(suffix)]
