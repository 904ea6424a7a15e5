"""Sets of whole numbers: row intervals that never overlap, and places that two sets share.

Pure: standard library only. Both structures cost what changes in them, not what they cover.
"""

from bisect import bisect_left
from collections.abc import Iterator

Interval = tuple[int, int]  # [first, end)

# The end of rows whose number nobody has counted yet; behind any real end.
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


_WORD = 256  # places a word: two levels of these reach 65,536 shards at a word operation each


class PlaceSet:
    """A set of places 0, 1, 2, ... that finds at once the first one it shares with another set.

    Bits in words, and one more number that says which words have any: `common` looks only at
    words that neither set has empty.
    """

    __slots__ = ("_filled", "_words")

    def __init__(self) -> None:
        self._words: dict[int, int] = {}
        self._filled = 0

    @staticmethod
    def from_flags(flags: bytes) -> "PlaceSet":
        """The places of the b"1"s in a string of b"0" and b"1"."""
        places = PlaceSet()
        for number in range(-(-len(flags) // _WORD)):
            if word := int(flags[number * _WORD : (number + 1) * _WORD][::-1], 2):
                places._words[number] = word
                places._filled |= 1 << number
        return places

    def add(self, place: int) -> None:
        number, bit = divmod(place, _WORD)
        self._words[number] = self._words.get(number, 0) | 1 << bit
        self._filled |= 1 << number

    def discard(self, place: int) -> None:
        number, bit = divmod(place, _WORD)
        word = self._words.get(number, 0) & ~(1 << bit)
        if word:
            self._words[number] = word
        elif self._words.pop(number, 0):
            self._filled ^= 1 << number

    def common(self, other: "PlaceSet") -> Iterator[int]:
        """The places in both sets, ascending."""
        filled = self._filled & other._filled
        while filled:
            lowest = filled & -filled
            number = lowest.bit_length() - 1
            word = self._words[number] & other._words[number]
            while word:
                bit = word & -word
                yield number * _WORD + bit.bit_length() - 1
                word ^= bit
            filled ^= lowest

    def __bool__(self) -> bool:
        return self._filled != 0

    def __len__(self) -> int:
        return sum(word.bit_count() for word in self._words.values())
