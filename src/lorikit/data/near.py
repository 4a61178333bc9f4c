"""Texts that say nearly the same: MinHash finds the candidates, the Jaccard index of their character n-grams decides.

    J(a, b) = |grams(a) & grams(b)| / |grams(a) | grams(b)|;   nearly equal: J >= NEARLY_EQUAL and the same numbers

The chance that a random hash has the same minimum over two sets is their J (Broder 1997). A text gets NUM_HASHES such
minima, in bands of BAND; texts with one equal band whose minima agree well enough are compared in full. That finds 87 of
100 pairs at J = 0.8, 99 at 0.85 and practically all at 0.9. Grams have three characters, or two where most characters are
Chinese, Japanese or Korean, since a sign there says what a syllable does elsewhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

NEARLY_EQUAL = 0.8
NUM_HASHES, BAND = 64, 4
WORTH_A_LOOK = 0.75  # share of equal minima, an estimate of J with a standard deviation of 0.05
_LARGE_BUCKET = 24
_NEIGHBOURS = 4
_BATCH = 2**14  # pairs compared at a time
_CHUNK = 2**19  # characters hashed at a time: some 20 MiB
_FACTORS = np.random.default_rng(1997).integers(1, 2**32, NUM_HASHES, dtype=np.uint32) | np.uint32(1)

_Ints: TypeAlias = NDArray[Any]
_Item: TypeAlias = tuple[object, str, tuple[str, ...]]

# Letters, digits, signs that change what a formula says, and the vowel marks of Hebrew, Arabic, Indic and Thai writing.
_DROPPED = re.compile(
    r"[^\w+*/=<>#%^$€£¥°\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]|_"
)
_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_WIDE = re.compile(
    r"[\u1100-\u11ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)


def plain(text: str) -> str:
    """What is compared of a text: no case, width, white space or punctuation; the text itself where nothing else is in it."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _DROPPED.sub("", text).casefold() or "".join(text.split())


def numbers(text: str) -> tuple[str, ...]:
    """The numbers that a text names, in order: texts that differ in one are different questions."""
    return tuple(_NUMBER.findall(text))


def gram_size(text: str) -> int:
    """2 where most characters are Chinese, Japanese or Korean, 3 otherwise."""
    return 2 if not text.isascii() and 2 * len(_WIDE.findall(text)) > len(text) else 3


def near_groups(texts: Sequence[str], kinds: Sequence[object] | None = None) -> list[int]:
    """For each text the index of the first text of its group; texts hang together over nearly equal ones of their kind.

    `kinds` (hashable, one a text) keeps texts apart that must not be compared. Depends on what the texts say and not on
    their order, and a text has no influence on groups that it does not belong to, but for one shortcut: of more than
    24 texts with an equal band, which come from a template, each is compared with its 4 neighbours in the order of
    their minima.
    """
    kinds = kinds if kinds is not None else [None] * len(texts)
    items = [(kind, plain(text), numbers(text)) for kind, text in zip(kinds, texts, strict=True)]
    first: dict[_Item, int] = {}
    for index, item in enumerate(items):
        first.setdefault(item, index)
    above: dict[int, int] = {}

    def root(index: int) -> int:
        while (over := above.get(index, index)) != index:
            above[index] = above.get(over, over)
            index = over
        return index

    peers = Counter((kind, named) for kind, _, named in first)
    some = sorted((item for item in first if peers[item[0], item[2]] > 1), key=_order)
    sets = lru_cache(2**14)(grams)  # for as long as this call: a set of a long text has some ten thousand bytes
    for size in (2, 3):
        alike = [item for item in some if gram_size(item[1]) == size]
        for a, b in _candidates(alike):
            left, right = root(first[alike[a]]), root(first[alike[b]])
            if left != right and jaccard(sets(alike[a][1]), sets(alike[b][1])) >= NEARLY_EQUAL:
                above[max(left, right)] = min(left, right)
    return [root(first[item]) for item in items]


def _order(item: _Item) -> bytes:
    return blake2b(item[1].encode("utf-8", "surrogatepass"), digest_size=16).digest()


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """The Jaccard index of two sets of grams that are not both empty."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def grams(text: str) -> frozenset[str]:
    """The character n-grams of a `plain` text; the text itself where it is shorter than one."""
    size = gram_size(text)
    return frozenset(text[i : i + size] for i in range(max(1, len(text) - size + 1)))


def _candidates(items: Sequence[_Item]) -> Iterator[tuple[int, int]]:
    """Pairs worth a look, each once: an equal band, and minima that agree as those of nearly equal texts do."""
    if len(items) < 2:
        return
    names: dict[object, int] = {}
    # Texts of two kinds, or with different numbers, are never compared.
    apart = np.array([names.setdefault((kind, named), len(names)) for kind, _, named in items])
    minima = signatures([text for _, text, _ in items])
    pairs = [part for band in range(0, NUM_HASHES, BAND) for part in _pairs_of_band(minima, apart, band)]
    if not pairs:
        return
    codes = np.sort(np.concatenate(pairs))
    codes = codes[np.concatenate([[True], codes[1:] != codes[:-1]])]
    for start in range(0, len(codes), _BATCH):
        left, right = np.divmod(codes[start : start + _BATCH], len(items))
        enough = (minima[left] == minima[right]).mean(axis=1) >= WORTH_A_LOOK
        yield from zip(left[enough].tolist(), right[enough].tolist(), strict=True)


def _pairs_of_band(minima: _Ints, apart: _Ints, band: int) -> Iterator[_Ints]:
    """Pairs of one band as left * len(minima) + right, int64."""
    turned = np.roll(minima, -band, axis=1)  # the band first, then others, so that neighbours in a bucket are alike
    order = np.lexsort((*(turned[:, column] for column in range(2 * BAND - 1, -1, -1)), apart))
    keys = np.column_stack([apart[order], turned[order, :BAND]])
    # place[i]: how many texts before i in this order share its band.
    new = np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(order)))
    place, size = np.arange(len(order)) - np.repeat(starts, sizes), np.repeat(sizes, sizes)
    for step in range(1, min(int(sizes.max()), _LARGE_BUCKET + 1)):
        reach = (place >= step) & ((size <= _LARGE_BUCKET) | (step <= _NEIGHBOURS))
        at = np.flatnonzero(reach)
        if len(at) == 0:
            continue
        left, right = order[at - step], order[at]
        yield np.minimum(left, right) * len(order) + np.maximum(left, right)


def signatures(texts: Sequence[str]) -> _Ints:
    """(len(texts), NUM_HASHES) uint32: for each `plain` text the minima of its hashed grams. All of one gram size."""
    size = gram_size(texts[0])
    minima = np.empty((len(texts), NUM_HASHES), dtype=np.uint32)
    start = 0
    while start < len(texts):
        end, num_chars = start, 0
        while end < len(texts) and (end == start or num_chars + len(texts[end]) <= _CHUNK):
            num_chars += len(texts[end])
            end += 1
        minima[start:end] = _minima([text.ljust(size, "\0") for text in texts[start:end]], size)
        start = end
    return minima


def _minima(texts: Sequence[str], size: int) -> _Ints:
    hashed, counts = _hashed(texts, size)
    starts = np.concatenate([[0], counts.cumsum()[:-1]])
    return np.stack([np.minimum.reduceat(hashed * factor, starts) for factor in _FACTORS], axis=1)


def _hashed(texts: Sequence[str], size: int) -> tuple[_Ints, _Ints]:
    """Hashes of the grams of all texts, end to end, (grams,) uint32, and how many each text has. No text is shorter."""
    chars = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    ends = lengths.cumsum()
    num = len(chars) - size + 1
    hashed = np.zeros(num, dtype=np.uint64)
    for place in range(size):
        hashed = hashed * np.uint64(0x100000001B3) + chars[place : num + place]
    hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (hashed >> np.uint64(32)).astype(np.uint32)
    inside = np.ones(num, dtype=bool)
    for place in range(1, size):  # grams that would reach into the next text
        inside[ends[:-1] - place] = False
    return mixed[inside], lengths - size + 1
