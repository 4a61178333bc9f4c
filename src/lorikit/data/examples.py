"""Many Examples in little memory: a list of integers takes 8 bytes an id, or more, and an array of them 4."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from lorikit.data.values import Example


class PackedExamples(Sequence[Example]):
    """Examples that are made anew, equal but not the same, each time that they are asked for."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._rows = [(array("i", one.input_ids), array("i", one.labels), one.source) for one in examples]

    @classmethod
    def joined(cls, parts: Iterable[PackedExamples]) -> PackedExamples:
        """The examples of all parts, in order, without unpacking them."""
        whole = cls()
        for part in parts:
            whole._rows += part._rows
        return whole

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [_unpacked(*row) for row in self._rows[place]]
        return _unpacked(*self._rows[place])

    def __iter__(self) -> Iterator[Example]:
        return (_unpacked(*row) for row in self._rows)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def _unpacked(input_ids: array[int], labels: array[int], source: str) -> Example:
    return Example(input_ids.tolist(), labels.tolist(), source)
