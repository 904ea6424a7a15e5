"""Which shards each client has: said once, when it joins, and never scanned when rows are leased.

With ten clients and 240 shards a plain set would do. This, and the ordered words of `intervals.py`, keep a
round of 1,000 clients and thousands of shards within a second of leasing (benchmarks/ledger.py); both stay
behind `ShardSet.places`.
"""

from collections.abc import Collection, Iterator

from pilot.rules.epoch_rows import EpochRows
from pilot.rules.intervals import WORD, OrderedPlaces, Places, PlaceSet


class ShardSet:
    """A set of shards; clients that have the same ones share it. `flags` has b"1" for each of them."""

    def __init__(self, flags: bytes) -> None:
        self.flags, self.size = flags, flags.count(b"1")
        self._places: dict[EpochRows, Places] = {}

    def places(self, epoch: EpochRows) -> Places:
        """Where the shards stand in the epoch's order, without a look at all of the order.

        Those of a small set are looked up, those of a large one are found as they are asked for: otherwise the
        first round of an epoch would cost a walk over all shards for each set.
        """
        if epoch not in self._places:
            if self.size < WORD:
                self._places[epoch] = PlaceSet.of(epoch.place[shard] for shard in self._shards())
            else:
                self._places[epoch] = OrderedPlaces(epoch.order, self.flags)
        return self._places[epoch]

    def _shards(self) -> Iterator[int]:
        shard = -1
        while (shard := self.flags.find(b"1", shard + 1)) >= 0:
            yield shard


class ShardSets:
    """The shards that each client of a run has, out of 0..num_shards-1."""

    def __init__(self, num_shards: int) -> None:
        self.everything = ShardSet(b"1" * num_shards)
        self._sets = {self.everything.flags: self.everything}
        self._clients: dict[str, ShardSet] = {}

    def register(self, client: str, shards: Collection[int]) -> None:
        """`client` has `shards` on its disk, and no others."""
        flags = bytearray(b"0" * self.everything.size)
        for shard in shards:
            if 0 <= shard < self.everything.size:
                flags[shard] = ord("1")
        self._clients[client] = self._sets.setdefault(bytes(flags), ShardSet(bytes(flags)))
        if len(self._sets) > 2 * len(self._clients) + 1:  # some belong to no client any more
            in_use = [self.everything, *self._clients.values()]
            self._sets = {shard_set.flags: shard_set for shard_set in in_use}

    def of(self, client: str) -> ShardSet:
        """Where rows for the client may come from: any shard, for one that never said what it has."""
        return self._clients.get(client, self.everything)
