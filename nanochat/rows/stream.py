"""Rows in the order in which they are trained on: those of a lease, or of epoch after epoch."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from nanochat.errors import UserError
from nanochat.rows.cache import RowCache, ShardRows, StopCheck


def shard_order(num_shards: int, epoch: int, seed: int) -> list[int]:
    """The order of training shards 0..n-1 in `epoch`; the same on all machines. Every seed shuffles."""
    order = list(range(num_shards))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


class SegmentLike(Protocol):
    """A dataclass with these fields, such as `Segment`: a lease may come with segments of its own."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def epoch(self) -> int: ...
    @property
    def shard(self) -> int: ...
    @property
    def first_row(self) -> int: ...
    @property
    def end_row(self) -> int | None: ...


S = TypeVar("S", bound=SegmentLike)


@dataclass(frozen=True)
class Segment:
    """Rows first_row..end_row-1 of a shard in an epoch; `end_row` None: up to the shard's end."""

    epoch: int
    shard: int
    first_row: int
    end_row: int | None


class RowStream(Generic[S]):
    """The rows of a lease in order, one segment after another.

    Packs one shard ahead of the one that is being read.
    """

    def __init__(self, cache: RowCache, segments: Sequence[S]) -> None:
        self._cache = cache
        self._segments = list(segments)
        self._served = [0] * len(self._segments)  # rows read of each
        self._current = 0

    def read(self, num_rows: int, *, should_stop: StopCheck | None = None) -> np.ndarray:
        """The next rows, (m, T+1), m <= num_rows; fewer only when the lease is exhausted, or once
        `should_stop()` is true while waiting for rows."""
        parts: list[np.ndarray] = []
        missing = num_rows
        while missing and self._current < len(self._segments):
            segment = self._segments[self._current]
            shard_rows = self._cache.rows(segment.shard)
            self._pack_ahead(shard_rows)
            first = segment.first_row + self._served[self._current]
            end = first + missing
            if segment.end_row is not None:
                end = min(end, max(first, segment.end_row))
            rows = shard_rows.read(first, end, should_stop=should_stop)
            parts.append(rows)
            self._served[self._current] += len(rows)
            missing -= len(rows)
            if not missing:
                break
            if len(rows) < end - first and shard_rows.num_rows is None:
                break  # `should_stop` said so
            self._current += 1
        if parts:
            return np.concatenate(parts)
        return np.empty((0, self._cache.sequence_len + 1), dtype=self._cache.dtype)

    def consumed(self, num_rows: int) -> list[S]:
        """The segments, with known ends, that the first `num_rows` rows of this stream came from."""
        intervals = []
        left = num_rows
        for segment, served in zip(self._segments, self._served, strict=True):
            taken = min(left, served)
            if taken:
                end_row = segment.first_row + taken
                intervals.append(dataclasses.replace(segment, end_row=end_row))
            left -= taken
        if left:
            raise ValueError(f"{num_rows} rows were not read, only {num_rows - left}")
        return intervals

    @property
    def position(self) -> tuple[int, int, int, int | None] | None:
        """(epoch, shard, next row, rows in the shard if known); None for an empty lease."""
        if not self._segments:
            return None
        index = min(self._current, len(self._segments) - 1)
        segment = self._segments[index]
        row = segment.first_row + self._served[index]
        return segment.epoch, segment.shard, row, self.known_rows.get(segment.shard)

    @property
    def known_rows(self) -> dict[int, int]:
        return self._cache.known_rows

    def _pack_ahead(self, current: ShardRows) -> None:
        if current.num_rows is not None and self._current + 1 < len(self._segments):
            self._cache.rows(self._segments[self._current + 1].shard)


class EpochStream:
    """Rows of all training shards, epoch after epoch, each in its seeded order of shards."""

    def __init__(
        self,
        cache: RowCache,
        *,
        num_shards: int,
        seed: int,
        epoch: int = 0,
        shard: int | None = None,
        row: int = 0,
    ) -> None:
        """Begins at `row` of `shard` (None: the first) in `epoch`, as `position` once said."""
        self._cache, self._num_shards, self._seed = cache, num_shards, seed
        self._epoch = epoch
        self._stream = self._open(epoch, shard, row)

    def read(self, num_rows: int, *, should_stop: StopCheck | None = None) -> np.ndarray:
        """The next rows, (num_rows, T+1): what an epoch's end lacks comes from the next epoch.

        Fewer only once `should_stop()` is true while waiting for rows.
        """
        parts: list[np.ndarray] = []
        missing, barren_epochs = num_rows, 0
        while missing:
            rows = self._stream.read(missing, should_stop=should_stop)
            parts.append(rows)
            missing -= len(rows)
            if missing and should_stop is not None and should_stop():
                break
            if missing:
                barren_epochs = 0 if len(rows) else barren_epochs + 1
                if barren_epochs > 1:
                    raise UserError(
                        f"{self._num_shards} shards of {self._cache.source.name} hold no row of "
                        f"{self._cache.sequence_len} tokens: choose a shorter sequence length"
                    )
                self._epoch += 1
                self._stream = self._open(self._epoch)
        return np.concatenate(parts)

    @property
    def position(self) -> tuple[int, int, int, int | None]:
        """(epoch, shard, next row, rows in the shard if known)."""
        position = self._stream.position
        assert position is not None
        return position

    def _open(self, epoch: int, shard: int | None = None, row: int = 0) -> RowStream[Segment]:
        order = shard_order(self._num_shards, epoch, self._seed)
        rest = order if shard is None else order[order.index(shard) :]
        segments = [Segment(epoch, number, 0, None) for number in rest]
        segments[0] = dataclasses.replace(segments[0], first_row=row)
        return RowStream(self._cache, segments)
