"""Small ledgers, and clients that use up their leases."""

import random

from pilot.rules.ledger import Lease, Ledger
from pilot.segment import Segment

Row = tuple[int, int, int]  # epoch, shard, row


def order(num_shards: int, epoch: int) -> list[int]:
    return random.Random(epoch).sample(range(num_shards), num_shards)


def make(num_shards: int = 3, epochs: int = 1) -> Ledger:
    return Ledger(num_shards=num_shards, epochs=epochs, shard_order=lambda _: range(num_shards))


def rows_of(segment: Segment, sizes: list[int]) -> list[Row]:
    end = sizes[segment.shard] if segment.end_row is None else segment.end_row
    return [(segment.epoch, segment.shard, row) for row in range(segment.first_row, end)]


def consume(lease: Lease, num_rows: int, sizes: list[int]) -> tuple[list[Segment], set[int]]:
    """What a client reports that trained on `num_rows`: its segments, the shards read to their end."""
    used, ended, left = [], set(), num_rows
    for segment in lease.segments:
        rows = len(rows_of(segment, sizes))
        if not left and rows:
            break
        taken = min(rows, left)
        left -= taken
        if taken:
            end_row = segment.first_row + taken
            used.append(Segment(segment.epoch, segment.shard, segment.first_row, end_row))
        if left and taken == rows:
            ended.add(segment.shard)
    return used, ended


def known(*sizes: int, epochs: int = 1) -> Ledger:
    """A ledger that knows how many rows each shard has; nothing is committed."""
    return Ledger.from_state(
        make(len(sizes), epochs).to_state() | {"row_counts": [list(p) for p in enumerate(sizes)]},
        shard_order=lambda _: range(len(sizes)),
    )


def rows_leased(leases: dict[str, Lease]) -> dict[str, int]:
    return {c: sum(s.rows or 0 for s in lease.segments) for c, lease in leases.items()}
