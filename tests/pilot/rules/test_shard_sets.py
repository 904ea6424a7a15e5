"""Which shards a client has, in the order of an epoch, for sets of any size."""

from random import Random
from typing import Any

import pytest

from pilot.rules.epoch_rows import EpochRows
from pilot.rules.intervals import WORD, PlaceSet
from pilot.rules.shard_sets import ShardSet, ShardSets

SHARDS = 10_000


class CountingOrder(list[int]):
    """An epoch's order that counts how many of its shards are looked at."""

    looked_at = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.looked_at += len(found) if isinstance(index, slice) else 1
        return found


@pytest.fixture
def epoch() -> EpochRows:
    return EpochRows(CountingOrder(Random(0).sample(range(SHARDS), SHARDS)), {})


def set_of(*shards: int) -> ShardSet:
    sets = ShardSets(SHARDS)
    sets.register("a", shards)
    return sets.of("a")


@pytest.mark.parametrize("size", [0, 1, WORD - 1, WORD, WORD + 1, SHARDS // 2, SHARDS])
def test_a_set_of_any_size_has_its_shards_where_the_epoch_has_them(
    epoch: EpochRows, size: int
) -> None:
    shards = Random(size).sample(range(SHARDS), size)
    places = set_of(*shards).places(epoch)
    everywhere = PlaceSet.from_flags(b"1" * SHARDS)
    assert [epoch.order[place] for place in everywhere.common(places)] == sorted(
        shards, key=epoch.place.__getitem__
    )


@pytest.mark.parametrize("size", [10, SHARDS // 20, SHARDS // 2, SHARDS])
def test_first_choice_of_an_epoch_looks_at_few_of_its_shards(epoch: EpochRows, size: int) -> None:
    shards_here = set_of(*Random(size).sample(range(SHARDS), size))
    shard = epoch.choose("a", shards_here.places(epoch))
    assert shard is not None and shards_here.flags[shard] == ord("1")
    assert isinstance(epoch.order, CountingOrder)
    assert epoch.order.looked_at <= 2 * WORD
