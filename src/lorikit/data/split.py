"""Which rows are held out: whole groups of equal and nearly equal prompts, chosen by a hash of what a prompt says.

A group's place is the hash of one of its prompts and nothing else. Row order and seed do not move it, and for a share
neither do rows that are added later, so that two runs on a growing file are judged on the same old questions: an added
row moves at most the rows of the group that it joins.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from lorikit.data.near import near_groups, numbers, plain
from lorikit.data.values import Conversation
from lorikit.errors import ConfigError

MOST_ALIKE = 20
"""Different prompts that may form one group. More of them come from a template whose gaps are filled in ("Translate this
sentence: ..."); they are as many questions as there are prompts, and are held out one by one."""


def prompt_key(conversation: Conversation) -> bytes:
    """A 32-byte hash of everything before the last assistant turn, its white space normalised and its case folded."""
    turns = [(turn.role, " ".join(turn.content.split()).casefold()) for turn in conversation.messages[:-1]]
    return _hash(turns)


def group_keys(conversations: Sequence[Conversation]) -> list[bytes]:
    """For each row the 32-byte key of its group.

    Prompts are one group where their last user turns are equal or nearly equal (see `near`) and all before is equal, but
    for case, width, white space and punctuation. The key is the hash of one of the group's prompts: the one that another
    hash puts first, so that a large group is held out as likely as a small one.
    """
    # A conversation that is only an answer cannot be read; an empty question keeps this function total.
    questions = [row.messages[-2].content if len(row.messages) > 1 else "" for row in conversations]
    contexts = [
        _hash(
            [(turn.role, plain(turn.content)) for turn in row.messages[:-2]] + [turn.role for turn in row.messages[-2:]]
        )
        for row in conversations
    ]
    pairs = zip(contexts, questions, strict=True)
    own = [_hash((context, plain(text), numbers(text))) for context, text in pairs]
    roots = near_groups(questions, contexts)
    members: defaultdict[int, set[bytes]] = defaultdict(set)
    for root, key in zip(roots, own, strict=True):
        members[root].add(key)
    place = {root: min(keys, key=_hash) for root, keys in members.items() if len(keys) <= MOST_ALIKE}
    return [place.get(root, key) for root, key in zip(roots, own, strict=True)]


def split(keys: Sequence[bytes], eval_size: float) -> list[bool]:
    """For each row, given by the key of its group, whether it is held out.

    A share (`eval_size` below 1) holds out the groups whose hash lies below that share of all hashes: about that share
    of the groups, the same ones however many rows join them. A number of rows is filled with the groups of lowest
    hash that still fit, so that it is met wherever groups of one row remain, and never exceeded. With two groups or
    more and `eval_size` not 0, neither side is empty: a share too small for the file holds out the lowest hash, one
    too large leaves the highest to train, and a number below the size of every group holds out the smallest group.
    Raises ConfigError for a number that leaves no row to train.
    """
    if eval_size >= 1 and len(keys) <= eval_size:
        raise ConfigError(
            f"eval.eval_size is {eval_size:.0f} rows, but only {len(keys)} can be used, so that none would be left to "
            "train; give a smaller number, or a share below 1"
        )
    sizes = Counter(keys)
    if eval_size == 0 or len(sizes) < 2:
        return [False] * len(keys)
    chosen = _share(sizes, eval_size) if eval_size < 1 else _number(sizes, int(eval_size))
    return [key in chosen for key in keys]


def _share(sizes: Counter[bytes], share: float) -> set[bytes]:
    groups = sorted(sizes)
    threshold = int(share * 2**256)
    return {group for group in groups[:-1] if int.from_bytes(group, "big") < threshold} or {groups[0]}


def _number(sizes: Counter[bytes], missing: int) -> set[bytes]:
    chosen: set[bytes] = set()
    for group in sorted(sizes):
        if sizes[group] <= missing:
            chosen.add(group)
            missing -= sizes[group]
    return chosen or {min(sorted(sizes), key=lambda group: sizes[group])}


def _hash(value: object) -> bytes:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).digest()
