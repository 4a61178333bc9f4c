"""The verdict on a run, in words, by rules that can be read here; every reason carries its figures.

learned      better than the base on rows it has not seen, and answers follow from their questions
overfitted   better on its training rows, and on others not, by little of it, or worse than it was earlier in the run
overfitted later   beside "learned": training went on until others got worse, but the adapter from before is the one saved
not learned  better on neither; or answers are no likelier after their own question than after another's
forgets      loses answers of the panel, more than chance would have it
unproven     better on its training rows; nobody held rows out that could say more
"""

from __future__ import annotations

from lorikit.report.panel import chance
from lorikit.report.values import Comparison, Curve, Losses, Reason, Verdict, Word

LEAST_CARRIED = 1 / 3
"""Of what was gained on trained rows, the share that has to show on held-out rows. Facts that no other row repeats cannot
carry over, so that it is far below 1 in healthy runs."""
MOST_RISEN = 0.05
"""Share by which the held-out loss of the saved adapter may lie over the lowest of the run."""
MOST_RISEN_LATER = 0.1
"""The same for the last held-out loss of a run whose best adapter was saved: nothing is lost but time, so that only a rise
that is no noise gets a word."""
LEAST_LOST = 0.15
"""Share of the base's right answers that must be lost to call it forgetting, beside being more than chance."""
FEW_ROWS = 8
"""Held-out rows below which answers are not held against their questions: too few to tell."""

_SENTENCES: dict[Word, str] = {
    "learned": "On rows it has not seen, the tuned model does better than its base.",
    "overfitted": "The tuned model knows its training rows by heart, and does less well on rows it has not seen.",
    "overfitted later": "Training went on past that and learned its rows by heart; the adapter saved is the one from before.",
    "not learned": "The tuned model does not answer new questions better than its base for having been trained.",
    "forgets": "Training took away what the base knew.",
    "unproven": "The tuned model does better on its training rows; whether on others too, nobody can say.",
}
_ADVICE: dict[Word, str] = {
    "overfitted": "train for fewer epochs, keep eval.load_best_model_at_end, or bring more rows",
    "not learned": "see the rows with `lorikit check`, those of the worst loss in report.html, and the learning rate",
    "forgets": "take a lower train.learning_rate or fewer epochs, or mix ordinary questions into the rows",
    "unproven": "hold more rows out: eval.eval_size takes a share or a number of rows; or name a file of your own in eval.data",
}


def judge(found: Comparison) -> Verdict:
    """The verdict on a comparison."""
    forgets, panel_reason = _panel(found)
    first = _first_word(found)
    harmed = found.trained is not None and not found.trained.is_better
    words: tuple[Word, ...] = (first,) if first else ()
    if first == "learned" and found.curve and _risen(found.curve.last, found.curve.lowest) > MOST_RISEN_LATER:
        words = ("learned", "overfitted later")
    if forgets:
        words = ("forgets", *words) if harmed else (*words, "forgets")
    words = words or ("unproven",)
    reasons = [
        *_loss_reasons(found),
        *_fit_reasons(found),
        *_curve_reasons(found.curve),
        panel_reason,
        *_side_reasons(found),
    ]
    advice = [_ADVICE[word] for word in words if word in _ADVICE]
    if first == "learned" and found.curve and _risen(found.curve.last, found.curve.lowest) > MOST_RISEN:
        advice.append(
            f"the steps after {found.curve.lowest_step} were in vain: train.num_train_epochs: "
            f"{max(0.1, round(found.curve.epoch_of_lowest, 1)):g} would have been about enough"
        )
    sentence = " ".join(_SENTENCES[word] for word in words)
    if words == ("unproven",) and found.trained is None:
        sentence = "Without the rows of the run only the panel can be judged: it shows no forgetting beyond chance."
    return Verdict(words, sentence, tuple(reasons), tuple(found.unknown), tuple(advice))


def _first_word(found: Comparison) -> Word | None:
    """The word on learning; None where nothing can be said of it."""
    trained, held_out = found.trained, found.held_out
    if trained is None:
        return None
    if not trained.is_better:
        return "not learned" if held_out is None or not held_out.is_better else "learned"
    if held_out is None or held_out.error is None:
        return "unproven"
    if _ignores_questions(found):
        return "not learned"
    risen = found.curve is not None and _saved_late(found.curve)
    if risen or not held_out.is_better or _carried(trained, held_out) < LEAST_CARRIED:
        return "overfitted"
    return "learned"


def _ignores_questions(found: Comparison) -> bool:
    fit = found.fit
    return fit is not None and fit.num_rows >= FEW_ROWS and fit.tuned <= 2 * fit.tuned_error


def _carried(trained: Losses, held_out: Losses) -> float:
    return held_out.gain / trained.gain


def _saved_late(curve: Curve) -> bool:
    """Whether the adapter is from after the lowest held-out loss, which has risen; one from before has more to learn."""
    return curve.saved_step > curve.lowest_step and _risen(curve.saved, curve.lowest) > MOST_RISEN


def _risen(loss: float, lowest: float) -> float:
    return loss / lowest - 1 if lowest > 0 else 0.0


def _loss_reasons(found: Comparison) -> list[Reason]:
    reasons = []
    for name, losses in (("held-out", found.held_out), ("trained", found.trained)):
        if losses is None:
            continue
        base, tuned = losses.perplexities
        word = "lower" if losses.gain >= 0 else "higher"
        error = f" ± {2 * losses.error:.2f}" if losses.error is not None else ""
        reasons.append(
            Reason(
                f"loss on {losses.num_rows:,} of {losses.of_rows:,} {name} rows: {losses.base:.2f} → {losses.tuned:.2f}, "
                f"{abs(losses.gain):.2f}{error} {word} (perplexity {base:,.1f} → {tuned:,.1f}); better on "
                f"{losses.rows_better:,} of them",
                "good" if losses.is_better else "bad" if losses.is_worse or name == "held-out" else "plain",
            )
        )
    if found.held_out and found.trained and found.trained.is_better:
        share = _carried(found.trained, found.held_out)
        text = f"of what was gained on trained rows, {100 * share:.0f} % shows on held-out rows"
        reasons.append(Reason(text, "good" if share >= LEAST_CARRIED else "bad"))
    return reasons


def _fit_reasons(found: Comparison) -> list[Reason]:
    fit = found.fit
    if fit is None:
        return []
    head = (
        f"answers of {fit.num_rows} held-out rows after their own question and after another's: {fit.tuned:+.2f} ± "
        f"{2 * fit.tuned_error:.2f} nats a token (base {fit.base:+.2f} ± {2 * fit.base_error:.2f})"
    )
    if fit.num_rows < FEW_ROWS:
        return [Reason(f"{head}; too few rows to tell", "plain")]
    if not _ignores_questions(found):
        return [Reason(f"{head}: answers follow from their questions", "good")]
    labels = (
        ""
        if fit.base > 2 * fit.base_error
        else ", nor to the base: do question and answer of the rows belong together?"
    )
    return [Reason(f"{head}: to the tuned model it makes no difference which question was asked{labels}", "bad")]


def _curve_reasons(curve: Curve | None) -> list[Reason]:
    if curve is None:
        return []
    risen = _risen(curve.saved, curve.lowest)
    text = f"the held-out loss was lowest, {curve.lowest:.3f}, after step {curve.lowest_step} of {curve.num_steps}"
    if curve.saved_step == curve.lowest_step:
        after = _risen(curve.last, curve.lowest)
        rose = f"; by step {curve.last_step} it rose to {curve.last:.3f}, {100 * after:.0f} % more"
        later = after > MOST_RISEN_LATER
        return [Reason(f"{text}: that adapter is the one saved{rose if later else ''}", "bad" if later else "good")]
    text += f"; this one is of step {curve.saved_step} with {curve.saved:.3f}, {100 * risen:.0f} % more"
    return [Reason(text, "bad" if _saved_late(curve) else "plain")]


def _panel(found: Comparison) -> tuple[bool, Reason]:
    outcomes = found.outcomes()
    kept, lost, gained = (outcomes.count(word) for word in ("kept", "lost", "gained"))
    likely = chance(outcomes)
    forgets = likely < 0.05 and lost >= LEAST_LOST * (kept + lost)
    text = f"of {kept + lost} panel questions that the base answers, {kept} are kept and {lost} lost; {gained} gained"
    if lost > gained:
        text += f" (chance alone would give such a loss in {100 * likely:.2g} of 100 cases)"
    return forgets, Reason(text, "bad" if forgets else "good" if kept and lost <= gained else "plain")


def _side_reasons(found: Comparison) -> list[Reason]:
    base, tuned, asked = found.base_side, found.tuned_side, len(found.answers)
    if base is None or tuned is None:
        return []
    chrf = f", chrF {base.chrf:.1f} → {tuned.chrf:.1f}" if base.chrf is not None and tuned.chrf is not None else ""
    reasons = [
        Reason(
            f"answers to {asked} held-out questions: {base.stopped} → {tuned.stopped} stop by themselves within "
            f"{found.max_new_tokens} tokens, {base.exact} → {tuned.exact} equal the data's{chrf}",
            "bad" if tuned.stopped < min(base.stopped, 0.8 * asked) else "plain",
        )
    ]
    if found.near_copies:
        text = (
            f"{len(found.near_copies)} of {asked} tuned answers nearly repeat a training row's that asks something else"
        )
        reasons.append(Reason(text, "bad" if len(found.near_copies) > asked / 4 else "plain"))
    return reasons
