"""Answers against what the data says: equal, alike by characters (chrF), and repeated from a training row.

chrF is sacrebleu's corpus score with its defaults (Popovic 2015: character n-grams to 6, beta 2).
"""

from __future__ import annotations

from collections.abc import Sequence

from lorikit.data.near import NEARLY_EQUAL, WORTH_A_LOOK, gram_size, grams, jaccard, plain, signatures
from lorikit.data.values import Conversation
from lorikit.report.values import Asked, NearCopy, Said, Side

LEAST = {2: 12, 3: 24}
"""Characters, by size of gram, from which on an answer can be a copy: "Yes." is said without having been learnt by heart."""


def chrf(answers: Sequence[str], references: Sequence[str]) -> float | None:
    """sacrebleu's corpus chrF, 0 to 100; None where it is not installed or there is no answer."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        return None
    return float(CHRF().corpus_score(list(answers), [list(references)]).score) if answers else None


def side(said: Sequence[Said], references: Sequence[str]) -> Side:
    """The counts of one model's answers. White space around and runs of it do not make answers differ."""
    texts = [one.text for one in said]
    equal = sum(" ".join(a.split()) == " ".join(b.split()) for a, b in zip(texts, references, strict=True))
    return Side(exact=equal, chrf=chrf(texts, references), stopped=sum(one.stopped for one in said))


def near_copies(answers: Sequence[Asked], trained: Sequence[Conversation]) -> list[NearCopy]:
    """Tuned answers that nearly repeat a training row's answer although their own row says something else."""
    found = []
    for size in (2, 3):
        known = {text: row.source for row in trained if _is_long(text := plain(row.messages[-1].content), size)}
        asked = [(one, text) for one in answers if _is_long(text := plain(one.tuned.text), size)]
        if not known or not asked:
            continue
        sources = list(known)
        minima = signatures(sources)
        for one, text in asked:
            own = plain(one.reference)
            own_alike = jaccard(grams(text), grams(own)) if own else 0.0
            agree = (minima == signatures([text])).mean(axis=1)
            near = [sources[i] for i in (agree >= WORTH_A_LOOK).nonzero()[0] if sources[i] != own]
            best = max(((jaccard(grams(text), grams(other)), other) for other in near), default=(0.0, ""))
            if best[0] >= NEARLY_EQUAL and best[0] > own_alike:
                found.append(NearCopy(one.question, one.tuned.text, known[best[1]], round(best[0], 3)))
    return found


def _is_long(text: str, size: int) -> bool:
    return gram_size(text) == size and len(text) >= LEAST[size]
