"""A run of rows of one shard in one epoch: the unit in which rows are leased, consumed and committed."""

from collections.abc import Sequence
from dataclasses import dataclass


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
