"""Streams of leased rows, in order and over the ends of shards."""

from dataclasses import dataclass

import numpy as np
import pytest

from nanochat.rows.stream import RowStream, Segment, shard_order

from ..data_kit import texts, write_shard
from .cache_kit import T, reference


@dataclass(frozen=True, order=True)
class OwnSegment:
    """A segment as another package declares it, with a field more."""

    epoch: int
    shard: int
    first_row: int
    end_row: int | None
    client: str


def test_a_stream_takes_and_returns_segments_of_any_dataclass(make_cache):
    segments = [OwnSegment(0, 1, 2, 4, "a"), OwnSegment(0, 0, 0, None, "b")]
    stream = RowStream(make_cache(), segments)
    assert len(stream.read(5)) == 5
    assert stream.consumed(5) == [segments[0], OwnSegment(0, 0, 0, 3, "b")]


def test_a_stream_gives_its_segments_in_order(make_cache, tokenizer):
    cache = make_cache()
    shards = [reference(tokenizer, texts(60, seed=shard), "stream") for shard in (0, 1)]
    segments = [Segment(0, 1, 5, 9), Segment(0, 0, 2, None), Segment(1, 1, 0, 10**6)]
    expected = np.concatenate([shards[1][5:9], shards[0][2:], shards[1]])
    stream = RowStream(cache, segments)
    assert stream.position == (0, 1, 5, None)
    parts = [stream.read(3)]
    assert stream.position is not None and stream.position[:3] == (0, 1, 8)
    while len(part := stream.read(7)):
        parts.append(part)
    assert [len(part) for part in parts[:-1]] == [3] + [7] * (len(parts) - 2)
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert stream.read(1).shape == (0, T + 1)
    assert stream.known_rows == {0: len(shards[0]), 1: len(shards[1])}
    assert stream.position == (1, 1, len(shards[1]), len(shards[1]))
    whole = [
        Segment(0, 1, 5, 9),
        Segment(0, 0, 2, len(shards[0])),
        Segment(1, 1, 0, len(shards[1])),
    ]
    assert stream.consumed(len(expected)) == whole
    assert stream.consumed(6) == [Segment(0, 1, 5, 9), Segment(0, 0, 2, 4)]
    assert stream.consumed(4) == [Segment(0, 1, 5, 9)]
    assert stream.consumed(0) == []
    with pytest.raises(ValueError, match="were not read"):
        stream.consumed(len(expected) + 1)


def test_a_segment_without_rows_is_passed_over(make_cache, mine):
    write_shard(mine, 0, ["short"])
    stream = RowStream(
        make_cache(), [Segment(0, 0, 0, None), Segment(0, 1, 4, 4), Segment(0, 1, 0, 2)]
    )
    assert len(stream.read(10)) == 2
    assert stream.consumed(2) == [Segment(0, 1, 0, 2)]


def test_an_empty_lease_has_no_rows(make_cache):
    stream = RowStream(make_cache(), [])
    assert stream.read(4).shape == (0, T + 1) and stream.read(4).dtype == np.uint16
    assert stream.position is None and stream.consumed(0) == []


def test_the_next_shard_is_packed_while_this_one_is_read(make_cache):
    cache = make_cache()
    cache.rows(0).read(0, 10**9)
    stream = RowStream(cache, [Segment(0, 0, 0, None), Segment(0, 1, 0, None)])
    stream.read(1)
    assert 1 in cache._shards


def test_shard_order_is_a_permutation_pinned_for_all_machines():
    assert shard_order(8, 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]
    orders = [tuple(shard_order(50, epoch, seed)) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
