"""The terminal chat: answers as they come, a history kept within what the model takes, and a few commands.

With a piped stdin it is a filter for scripts: a question a line in, answers on stdout, remarks on stderr, errors raised.
"""

from __future__ import annotations

import io
import sys
from contextlib import closing, nullcontext

from rich.console import Console

from lorikit.data.values import Message, answer_message
from lorikit.errors import ConfigError, LorikitError
from lorikit.infer.generate import check_sampling, stream
from lorikit.infer.session import Session
from lorikit.model.engine import Sampling

COMMANDS = {
    "/reset": "forget the conversation",
    "/base": "answer with the base model alone; once more: with the adapter",
    "/system TEXT": "another system prompt from here on; without TEXT: the run's own",
    "/help": "this list",
    "/exit": "leave, as do Ctrl-D and, while no answer is running, Ctrl-C",
}
# What a model says must not move the cursor or change the terminal: control characters but tab and line break go.
_HARMLESS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def chat(session: Session, sampling: Sampling) -> None:
    """Talk until the user leaves. Raises ConfigError for impossible sampling values.

    On a terminal an error is shown and the chat goes on; with a piped stdin it is raised.
    """
    check_sampling(sampling)
    for channel in (sys.stdin, sys.stdout):
        if isinstance(channel, io.TextIOWrapper):
            channel.reconfigure(errors="replace")  # a byte that is no text shall not end a conversation
    talk = _Chat(session, sampling, terminal=sys.stdin.isatty() and sys.stdout.isatty())
    try:
        talk.run()
    except KeyboardInterrupt:
        if not talk.terminal:
            raise
        talk.write("\n")


class _Chat:
    """One conversation: its turns, its system prompt if it has one of its own, and who answers."""

    def __init__(self, session: Session, sampling: Sampling, *, terminal: bool) -> None:
        self.session = session
        self.sampling = sampling
        self.terminal = terminal
        self.console = Console(stderr=not terminal, highlight=False, emoji=False, markup=False, soft_wrap=True)
        self.plain = self.console.no_color or self.console.is_dumb_terminal or not terminal
        self.history: list[Message] = []
        self.system: str | None = None
        self.base_only = False
        self.told_of_loss = False

    def run(self) -> None:
        """Read and answer, line by line, until /exit or the end of the input."""
        if self.terminal:
            import readline  # arrow keys and what was typed before, in input()

            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
            self.say(f"{self.session.name} on {self.session.engine.device}. /help lists the commands, Ctrl-D leaves.")
        going = True
        while going and (line := self.read()) is not None:
            try:
                if line.startswith("/"):
                    going = self.command(line)
                elif line.strip():
                    self.ask(line.strip())
            except LorikitError as error:
                if not self.terminal:
                    raise
                self.say(str(error))

    def read(self) -> str | None:
        """The next line, or None at the end of the input."""
        prompt = "base> " if self.base_only else "> "
        if not self.plain:
            prompt = f"\001\033[1m\002{prompt}\001\033[0m\002"  # \001 \002: readline counts no width between them
        try:
            return input(prompt if self.terminal else "")
        except EOFError:
            if self.terminal:
                self.write("\n")
            return None

    def command(self, line: str) -> bool:
        """Do what a line that starts with / says; False if it is to leave."""
        name, _, text = line.strip().partition(" ")
        if name == "/exit":
            return False
        if name == "/help":
            for command, meaning in COMMANDS.items():
                self.say(f"{command:<13} {meaning}")
        elif name == "/reset":
            self.history, self.told_of_loss = [], False
            self.say("The conversation is forgotten.")
        elif name == "/system":
            self.system = text.strip() or None
            self.say(
                "System prompt set; /reset forgets what was said so far."
                if self.system
                else "Back to the system prompt of the run, if it has one."
            )
        elif name == "/base" and self.session.merged:
            self.say("The adapter is merged into the base, which is not here alone; chat without --merge to compare.")
        elif name == "/base" and not self.session.has_adapter:
            self.say("There is no adapter here: this is the base model.")
        elif name == "/base":
            self.base_only = not self.base_only
            self.say(f"Answers come from {'the base model alone' if self.base_only else 'the model with its adapter'}.")
        else:
            names = ", ".join(command.split()[0] for command in COMMANDS)
            raise ConfigError(f"unknown command {name}; there are {names}. A question may start with / after a blank")
        return True

    def ask(self, question: str) -> None:
        """Answer one question and keep both in the history; Ctrl-C on a terminal ends the answer, not the chat."""
        asked = Message("user", question)
        reply = stream(self.session, self.fitting(asked), self.sampling)
        ended = ""
        speaker = self.session.engine.without_adapter() if self.base_only else nullcontext()
        try:
            with speaker, closing(reply):
                for piece in reply:
                    self.write(piece)
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            ended = ", stopped"
        self.write("\n")
        if reply.text:
            self.history += [asked, answer_message(reply.text)]
        if reply.finish == "length":
            ended = (
                f", cut: --max-new-tokens is {self.sampling.max_new_tokens}, the model takes {self.session.max_length}"
            )
        if self.terminal:
            self.say(f"{reply.num_tokens} tokens, {reply.num_tokens / max(reply.seconds, 1e-9):.1f} tokens/s{ended}\n")

    def fitting(self, asked: Message) -> list[Message]:
        """The conversation up to this question; its oldest turns are dropped until there is room for an answer."""
        system = [Message("system", self.system)] if self.system else []
        most = self.session.max_length - min(self.sampling.max_new_tokens, self.session.max_length // 4)
        dropped = 0
        while self.history and len(self.session.encoder.prompt_ids([*system, *self.history, asked])) > most:
            del self.history[:2]
            dropped += 1
        if dropped and not self.told_of_loss:
            self.told_of_loss = True
            self.say(
                "The conversation has become longer than the model takes: from here on the oldest turns are dropped."
            )
        return [*system, *self.history, asked]

    def write(self, text: str) -> None:
        """Words of the model, at once."""
        sys.stdout.write(text.translate(_HARMLESS) if self.terminal else text)
        sys.stdout.flush()

    def say(self, remark: str) -> None:
        """Words of the chat itself, dim on a terminal."""
        self.console.print(remark, style=None if self.plain else "dim")
