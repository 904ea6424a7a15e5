"""Sets of whole numbers: row intervals that never overlap, and places that two sets share.

Pure: standard library only. Both structures cost what changes in them, not what they cover.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

Interval = tuple[int, int]  # [first, end)

# The end of rows that have not been counted yet; behind any real end.
UNKNOWN_END = 1 << 62


def add(intervals: list[Interval], first: int, end: int) -> None:
    """Add [first, end) to sorted, disjoint `intervals`, joining neighbours.

    Raises ValueError if it is empty or any of it is there already; then nothing is changed.
    """
    at = bisect_left(intervals, (first,))
    before = intervals[at - 1] if at else None
    after = intervals[at] if at < len(intervals) else None
    if end <= first or (before and before[1] > first) or (after and after[0] < end):
        raise ValueError(f"rows {first}-{end} are empty, or there already: {intervals}")
    start, stop = at, at
    if before and before[1] == first:
        start, first = at - 1, before[0]
    if after and after[0] == end:
        stop, end = at + 1, after[1]
    intervals[start:stop] = [(first, end)]


def take_front(intervals: list[Interval], length: int) -> Interval:
    """Remove up to `length` numbers from the first interval; one of unknown end is taken whole."""
    first, end = intervals[0]
    if end != UNKNOWN_END and end - first > length:
        intervals[0] = (first + length, end)
        return first, first + length
    del intervals[0]
    return first, end


def cut(intervals: list[Interval], end: int) -> None:
    """Remove all numbers from `end` on."""
    while intervals and intervals[-1][0] >= end:
        intervals.pop()
    if intervals and intervals[-1][1] > end:
        intervals[-1] = (intervals[-1][0], end)


def gaps(intervals: list[Interval], end: int) -> list[Interval]:
    """What sorted, disjoint `intervals` leave of [0, end)."""
    edges = [0, *(edge for interval in intervals for edge in interval), end]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(first, last) for first, last in pairs if first < last]


def total(intervals: list[Interval]) -> int:
    return sum(end - first for first, end in intervals)


WORD = 256  # places a word: two levels of these reach 65,536 shards at a word operation each


class Places(Protocol):
    """A set of places as `PlaceSet.common` reads it: bits in words, and which words may have any."""

    @property
    def filled(self) -> int: ...

    def word(self, number: int) -> int: ...


class PlaceSet:
    """A set of places 0, 1, 2, ... that finds at once the first one it shares with another set.

    Bits in words, and one more number that says which words have any: `common` looks only at
    words that neither set has empty.
    """

    __slots__ = ("_words", "filled")

    def __init__(self) -> None:
        self._words: dict[int, int] = {}
        self.filled = 0

    @staticmethod
    def of(places: Iterable[int]) -> "PlaceSet":
        found = PlaceSet()
        for place in places:
            found.add(place)
        return found

    @staticmethod
    def from_flags(flags: bytes) -> "PlaceSet":
        """The places of the b"1"s in a string of b"0" and b"1"."""
        places = PlaceSet()
        for number in range(-(-len(flags) // WORD)):
            if word := int(flags[number * WORD : (number + 1) * WORD][::-1], 2):
                places._words[number] = word
                places.filled |= 1 << number
        return places

    def add(self, place: int) -> None:
        number, bit = divmod(place, WORD)
        self._words[number] = self._words.get(number, 0) | 1 << bit
        self.filled |= 1 << number

    def discard(self, place: int) -> None:
        number, bit = divmod(place, WORD)
        word = self._words.get(number, 0) & ~(1 << bit)
        if word:
            self._words[number] = word
        elif self._words.pop(number, 0):
            self.filled ^= 1 << number

    def word(self, number: int) -> int:
        return self._words[number]

    def common(self, other: Places) -> Iterator[int]:
        """The places in both sets, ascending."""
        filled = self.filled & other.filled
        while filled:
            lowest = filled & -filled
            number = lowest.bit_length() - 1
            word = self._words[number] & other.word(number)
            while word:
                bit = word & -word
                yield number * WORD + bit.bit_length() - 1
                word ^= bit
            filled ^= lowest

    def __bool__(self) -> bool:
        return self.filled != 0

    def __len__(self) -> int:
        return sum(word.bit_count() for word in self._words.values())


class OrderedPlaces:
    """The places in `order` of the numbers whose flag is b"1": read only, for `PlaceSet.common`.

    A word is made when it is first looked at. Who looks for the first place that two sets share sees one
    or two words of a set that fills most of them, however long the order is.
    """

    __slots__ = ("_flags", "_order", "_words", "filled")

    def __init__(self, order: Sequence[int], flags: bytes) -> None:
        self._order, self._flags = order, flags
        self._words: dict[int, int] = {}
        self.filled = (1 << -(-len(order) // WORD)) - 1

    def word(self, number: int) -> int:
        if number not in self._words:
            last_first = self._order[number * WORD : (number + 1) * WORD][::-1]
            self._words[number] = int(bytes(map(self._flags.__getitem__, last_first)), 2)
        return self._words[number]
