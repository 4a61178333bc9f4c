"""One run, before and after: the same prompts and rows to the base and to the tuned model, on one engine.

    run folder -> engine, rows as they were in training -> losses, answers, panel -> Comparison -> verdict, compare.json

The work is bounded (`Bounds`), the same rows are looked at each time, and answers are greedy, so that two comparisons of one
run say the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorikit.config import load_config
from lorikit.data.audit import DataSet, Prepared, audit, fingerprint, read
from lorikit.data.values import Conversation, Example, Message
from lorikit.errors import LorikitError
from lorikit.hub import resolve_data
from lorikit.infer.generate import answer
from lorikit.infer.session import Session, open_run
from lorikit.model.engine import Sampling
from lorikit.report.curves import read_curve
from lorikit.report.losses import both, fit, row_losses, spaced, summed, within
from lorikit.report.panel import outcome, panel
from lorikit.report.texts import near_copies, side
from lorikit.report.values import Asked, Comparison, Curve, Panelled, RowLoss, Said, Verdict
from lorikit.report.verdict import judge
from lorikit.train.checkpoint import step_of
from lorikit.train.optim import Budget
from lorikit.train.run_folder import ADAPTER_FOLDER, CONFIG
from lorikit.train.storage import write_file

COMPARISON = "compare.json"
Say = Callable[[str], None]
_WORST = 8
_PANEL_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most work that a comparison does: rows whose loss is taken, their tokens, rows that are answered."""

    loss_rows: int
    loss_tokens: int
    answers: int
    answer_tokens: int


def bounds(device: str, rows: int | None) -> Bounds:
    """What a device does in about a minute or less with a model that it can train; `rows` asks for as many rows instead."""
    few = device == "cpu"
    if rows is not None:
        return Bounds(rows, 2**40, rows, 128 if few else 256)
    return Bounds(64, 4_000, 24, 64) if few else Bounds(512, 200_000, 24, 256)


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison with its verdict, and what the report shows besides: the rows, and where compare.json was written."""

    comparison: Comparison
    verdict: Verdict
    session: Session
    data: DataSet | None
    prepared: Prepared | None
    written: Path | None

    def to_dict(self) -> dict[str, Any]:
        """compare.json."""
        verdict = {"title": self.verdict.title} | asdict(self.verdict)
        return {"verdict": verdict} | self.comparison.to_dict()


def compare(run: Path | str, *, rows: int | None = None, device: str = "auto", say: Say = lambda _: None) -> Compared:
    """Compare a run, a checkpoint of one or an adapter folder with its base; writes compare.json into a run folder.

    Raises what `open_run` raises, and DiskError. What is missing of the data is said in `Comparison.unknown`.
    """
    begun, run = time.perf_counter(), Path(run)
    session = open_run(run, device=device)
    unknown: list[str] = [note for note in session.notes if "not finished" in note]
    data, prepared = _rows(_run_folder(run), session, unknown)
    limits = bounds(session.engine.device.type, rows)
    comparison = _measure(run, session, data, prepared, limits, unknown, say, begun)
    compared = Compared(comparison, judge(comparison), session, data, prepared, None)
    if not (run / CONFIG).is_file():
        return compared
    target = run / COMPARISON
    write_file(target, json.dumps(compared.to_dict(), ensure_ascii=False, indent=1).encode("utf-8", "replace") + b"\n")
    return Compared(comparison, compared.verdict, session, data, prepared, target)


def is_compared(run: Path) -> bool:
    """Whether compare.json is about the adapter that the run holds now."""
    try:
        found = json.loads((run / COMPARISON).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("adapter_sha256") == _adapter_sha256(run) is not None


def _measure(
    run: Path,
    session: Session,
    data: DataSet | None,
    prepared: Prepared | None,
    limits: Bounds,
    unknown: list[str],
    say: Say,
    begun: float,
) -> Comparison:
    engine, encoder = session.engine, session.encoder
    budget = Budget(engine.best_tokens(), say)
    conversations = (
        {row.source: row for part in (data.train, data.eval) if part for row in part.conversations} if data else {}
    )
    held, trained = (prepared.held_out, prepared.train) if prepared else ([], [])
    looked_at, of_trained = (within(part, limits.loss_rows, limits.loss_tokens) for part in (held, trained))
    say(f"comparing with the base: losses of {len(looked_at)} held-out and {len(of_trained)} trained rows")
    sides = [_losses(session, part, budget) for part in (looked_at, of_trained)]
    rows = [conversations[source] for source in dict.fromkeys(example.source for example in looked_at)]
    checked = fit(engine, encoder, rows[:32], session.config.data.max_length, budget, _nothing) if rows else None
    asked = [rows[i] for i in spaced(len(rows), limits.answers)]
    longest = _longest_answer(session, asked, limits.answer_tokens)
    answers = _ask(session, asked, longest, say)
    panelled = _ask_panel(session, say)
    trained_rows = [conversations[source] for source in dict.fromkeys(example.source for example in trained)]
    references = [one.reference for one in answers]
    return Comparison(
        run=run.name,
        base_name=Path(session.base).name if Path(session.base).is_absolute() else session.base,
        adapter_sha256=_adapter_sha256(run),
        held_out=summed(sides[0], len({example.source for example in held})),
        trained=summed(sides[1], len(trained_rows)),
        fit=checked,
        answers=answers,
        base_side=side([one.base for one in answers], references) if answers else None,
        tuned_side=side([one.tuned for one in answers], references) if answers else None,
        panel=panelled,
        near_copies=near_copies(answers, trained_rows),
        worst=sorted(sides[1], key=lambda row: -row.tuned / row.tokens)[:_WORST],
        curve=curve_of(session.adapter or run, session.config.eval.load_best_model_at_end),
        max_new_tokens=longest,
        rows_sha256=_digest(rows) if rows else None,
        tokens_sha256=fingerprint(looked_at) if looked_at else None,
        seconds=round(time.perf_counter() - begun, 1),
        device=engine.device.type,
        unknown=tuple(unknown),
    )


def _rows(run: Path | None, session: Session, unknown: list[str]) -> tuple[DataSet | None, Prepared | None]:
    """The rows as they were trained and held out, or None with the reason in `unknown`."""
    if run is None:
        unknown.append("this adapter is in no run folder, so that its rows are not known: only the panel can be asked")
        return None, None
    config = load_config(run / CONFIG)
    try:
        names = [config.data.train] if isinstance(config.data.train, str) else config.data.train
        paths = [resolve_data(name, hub=config.model.hub).path for name in names]
        held = [resolve_data(config.eval.data, hub=config.model.hub).path] if config.eval.data else None
        data = read(paths, held, config.data)
        prepared = audit(data, config.data, config.eval, session.encoder)
    except LorikitError as error:
        unknown.append(
            f"the rows cannot be read again ({str(error).splitlines()[0]}); give the command where `train` was given"
        )
        return None, None
    try:
        before = json.loads((run / "data_report.json").read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if before != prepared.report.fingerprint:
        unknown.append("the files hold other rows now than when this run was trained: which were held out is not known")
        return None, None
    if not prepared.held_out:
        unknown.append(
            "no row was held out, so that nobody can say how the model does on rows it has not seen; set eval.eval_size"
        )
    return data, prepared


def _losses(session: Session, examples: Sequence[Example], budget: Budget) -> list[RowLoss]:
    if not examples:
        return []
    base, tuned, _ = both(session.engine, examples, budget, _nothing)
    return row_losses(examples, base, tuned)


def _ask(session: Session, rows: Sequence[Conversation], longest: int, say: Say) -> list[Asked]:
    """Both models' greedy answers to the last question of each row."""
    if not rows:
        return []
    say(f"comparing with the base: {len(rows)} held-out questions")
    base, tuned = _both_answers(session, [row.messages[:-1] for row in rows], longest)
    return [
        Asked(row.source, row.messages[-2].content, row.messages[-1].content, before, after)
        for row, before, after in zip(rows, base, tuned, strict=True)
    ]


def _ask_panel(session: Session, say: Say) -> list[Panelled]:
    questions = panel()
    say(f"comparing with the base: {len(questions)} questions of the forgetting panel")
    prompts = [(Message("user", one.question),) for one in questions]
    pairs = zip(questions, *_both_answers(session, prompts, _PANEL_TOKENS), strict=True)
    return [
        Panelled(q.name, q.kind, q.question, before, after, outcome(q.is_right(before.text), q.is_right(after.text)))
        for q, before, after in pairs
    ]


def _both_answers(
    session: Session, prompts: Sequence[Sequence[Message]], longest: int
) -> tuple[list[Said], list[Said]]:
    greedy = Sampling(max_new_tokens=longest, temperature=0.0, top_p=1.0, repetition_penalty=1.0)
    session.engine.train(False)
    with session.engine.without_adapter():
        base = answer(session, prompts, greedy)
    tuned = answer(session, prompts, greedy)
    before, after = (
        [Said(one.text.strip(), one.finish == "stop", one.num_tokens) for one in some] for some in (base, tuned)
    )
    return before, after


def _longest_answer(session: Session, rows: Sequence[Conversation], most: int) -> int:
    """Tokens an answer may have: half as many again as the longest in the data, within bounds."""
    lengths = [len(session.encoder.tokenizer(row.messages[-1].content)["input_ids"]) for row in rows]
    return max(16, min(most, 3 * max(lengths, default=0) // 2))


def _run_folder(path: Path) -> Path | None:
    """The run that a path is, or is a part of."""
    return next((folder for folder in (path, path.resolve().parent) if (folder / CONFIG).is_file()), None)


def curve_of(path: Path, saves_best: bool) -> Curve | None:
    """The held-out loss of the run that this is, or is a checkpoint of."""
    run = _run_folder(path)
    return read_curve(run, saves_best, None if path == run else step_of(path.resolve())) if run else None


def _adapter_sha256(run: Path) -> str | None:
    for folder in (run / ADAPTER_FOLDER, run):
        file = folder / "adapter_model.safetensors"
        if file.is_file():
            with file.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
    return None


def _digest(rows: Sequence[Conversation]) -> str:
    texts = [[(turn.role, turn.content) for turn in row.messages] for row in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _nothing() -> None:
    """No reason to stop: a signal ends a comparison where it is, for nothing is half-written."""
