"""Runs of rows: of a shard in an epoch, as leased, consumed and committed; of validation rows, as scored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Segment:
    """Rows [first_row, end_row) of a shard in an epoch; `end_row` None: to the shard's unknown end."""

    epoch: int
    shard: int
    first_row: int
    end_row: int | None

    @property
    def key(self) -> tuple[int, int]:
        return (self.epoch, self.shard)

    @property
    def rows(self) -> int | None:
        return None if self.end_row is None else self.end_row - self.first_row

    def to_list(self) -> list[int]:
        """As JSON and messages carry it: an open end is -1."""
        return [
            self.epoch,
            self.shard,
            self.first_row,
            -1 if self.end_row is None else self.end_row,
        ]

    @staticmethod
    def from_list(values: Sequence[int]) -> "Segment":
        """The inverse of `to_list`. Raises ValueError unless there are four values."""
        epoch, shard, first_row, end_row = values
        return Segment(epoch, shard, first_row, None if end_row < 0 else end_row)


def first_rows(segments: Iterable[Segment], rows: int, *, shard_rows: int) -> list[Segment]:
    """The segments that hold the first `rows` rows of `segments`, or all of them; `shard_rows` are where an
    open end is."""
    taken: list[Segment] = []
    for segment in segments:
        end = shard_rows if segment.end_row is None else segment.end_row
        stop = min(end, segment.first_row + rows)
        if stop > segment.first_row:
            taken.append(replace(segment, end_row=stop))
            rows -= stop - segment.first_row
    return taken


@dataclass(frozen=True, order=True)
class Score:
    """What a client measured on validation rows [first_row, end_row): sums of nats and of bytes."""

    first_row: int
    end_row: int
    nats: float
    num_bytes: int

    @property
    def piece(self) -> tuple[int, int]:
        return (self.first_row, self.end_row)

    def to_list(self) -> list[float]:
        return [self.first_row, self.end_row, self.nats, self.num_bytes]

    @staticmethod
    def from_list(values: Sequence[float]) -> "Score":
        """The inverse of `to_list`. Raises ValueError for what it can't have written."""
        first, end, nats, num_bytes = values
        if not 0 <= first < end or nats < 0 or num_bytes < 0:
            raise ValueError(f"{list(values)} is no score")
        return Score(int(first), int(end), float(nats), int(num_bytes))
