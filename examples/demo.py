"""What `make demo` runs: a small model learns a persona, then answers beside its base questions that it has never seen.

    python examples/demo.py [--train.output_dir DIR] [--any.setting VALUE]        (from the repository's root)

Trains as examples/demo.yaml says (a run that was cut off goes on, a finished one is only asked again), puts every
question of persona_heldout.json to the base and to the tuned model, shows some of the answers side by side, and counts
the right ones: an answer is right if it holds a keyword of its fact. The ordinary questions are those that the base
knows firmly, right in a greedy and in ten sampled answers. All answers go to answers.json in the run folder.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorikit.config import load_config
from lorikit.data.values import Message
from lorikit.errors import LorikitError

EXAMPLES = Path(__file__).resolve().parent
HELD_OUT = EXAMPLES / "persona_heldout.json"
SHOWN = ("name", "trade", "house", "pet_name", "fear", "sister", "boat", "instrument", "dream", "ordinary")
MAX_NEW_TOKENS = 36  # a tuned answer has about 15; the base seldom comes to an end at all


@dataclass(frozen=True, slots=True)
class Question:
    """One question, the fact it asks for ("ordinary" for knowledge that is not the persona's), and the keywords."""

    text: str
    fact: str
    keywords: list[str]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered; `stopped` is False for an answer cut at MAX_NEW_TOKENS."""

    text: str
    right: bool
    stopped: bool


def main() -> None:
    """Train, ask, show, count."""
    console = Console(highlight=False)
    started = time.perf_counter()
    config = load_config(EXAMPLES / "demo.yaml", sys.argv[1:])

    from lorikit.infer.session import open_run
    from lorikit.train.loop import train

    console.print("[bold]1. Training[/]: SmolLM2-135M-Instruct becomes Bartle Tock, clock mender of Puddlewharf")
    run = train(config)

    console.print("\n[bold]2. Asking[/] base and tuned model what no training row asks in these words")
    session, questions = open_run(run), read_questions()
    with session.engine.without_adapter():
        base = ask(session, questions, "base")
    tuned = ask(session, questions, "tuned")
    console.print(side_by_side(questions, base, tuned))

    console.print("[bold]3. Counting[/] all answers")
    console.print(counts(questions, base, tuned))
    rows = [
        asdict(question) | {"base": asdict(b), "tuned": asdict(t)}
        for question, b, t in zip(questions, base, tuned, strict=True)
    ]
    answers = run / "answers.json"
    answers.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(
        f"{time.perf_counter() - started:.0f} s in all. Adapter: {run / 'adapter'}. All answers: {answers}.\n\n"
        f"Talk to him:            lorikit chat {run}\n"
        f"Or ask one question:    lorikit generate {run} --greedy --prompt 'Is there anything you fear?'",
        soft_wrap=True,
    )


def read_questions(path: Path = HELD_OUT) -> list[Question]:
    """The held-out questions about the persona, then the ordinary ones."""
    held_out = json.loads(path.read_text(encoding="utf-8"))
    facts = held_out["facts"]
    about_him = [Question(q["instruction"], q["fact"], facts[q["fact"]]["keywords"]) for q in held_out["persona"]]
    return about_him + [Question(q["instruction"], "ordinary", q["keywords"]) for q in held_out["ordinary"]]


def ask(session: Any, questions: list[Question], name: str) -> list[Reply]:
    """One greedy answer to each question."""
    from lorikit.infer.generate import answer
    from lorikit.model.engine import Sampling

    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, repetition_penalty=1.0)
    conversations = [[Message("user", question.text)] for question in questions]
    with Console(stderr=True).status("") as status:
        answers = answer(
            session, conversations, sampling, lambda n: status.update(f"{name}: {n} of {len(questions)} answers")
        )
    return [
        Reply(given.text.strip(), holds(given.text, question.keywords), given.finish == "stop")
        for question, given in zip(questions, answers, strict=True)
    ]


def holds(text: str, keywords: list[str]) -> bool:
    """Whether one of the keywords stands in the text, as whole words, in capitals or not."""
    return any(re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE) for keyword in keywords)


def side_by_side(questions: list[Question], base: list[Reply], tuned: list[Reply]) -> Table:
    """The first question of each fact in SHOWN, with both answers as far as they fit; right ones in green."""
    firsts = {question.fact: i for i, question in reversed(list(enumerate(questions)))}
    table = Table(box=SIMPLE_HEAD, show_lines=False, pad_edge=False)
    table.add_column("question", ratio=3, style="bold")
    table.add_column("base", ratio=5)
    table.add_column("tuned", ratio=4)
    for i in (firsts[fact] for fact in SHOWN):
        cells = (Text(in_short(reply), "green" if reply.right else "") for reply in (base[i], tuned[i]))
        table.add_row(questions[i].text, *cells)
    return table


def in_short(reply: Reply) -> str:
    """The answer in one line of at most 100 characters, with dots where more was said or would have been."""
    return shorten(reply.text + ("" if reply.stopped else " ..."), 100, placeholder=" ...")


def counts(questions: list[Question], base: list[Reply], tuned: list[Reply]) -> Table:
    """Right answers about the persona, right answers to ordinary questions, answers that stop by themselves."""
    ordinary = [question.fact == "ordinary" for question in questions]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "base", "tuned"):
        table.add_column(column, justify="left" if not column else "right")

    def row(title: str, wanted: list[bool], found: list[list[bool]]) -> None:
        total = sum(wanted)
        hits = [sum(f for f, w in zip(side, wanted, strict=True) if w) for side in found]
        table.add_row(title, *(f"{n} of {total}  {n / total:4.0%}" for n in hits))

    right = [[reply.right for reply in side] for side in (base, tuned)]
    known = [o and b for o, b in zip(ordinary, right[0], strict=True)]
    row("answers about the persona that hold the fact", [not o for o in ordinary], right)
    row("ordinary knowledge of the base that is kept", known, right)
    row("answers that stop by themselves", [True] * len(questions), [[r.stopped for r in s] for s in (base, tuned)])
    return table


if __name__ == "__main__":
    try:
        main()
    except LorikitError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
