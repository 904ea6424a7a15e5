"""Which shards each client has: said once, when it joins, and never scanned when rows are leased."""

from collections.abc import Collection, Iterator

from pilot.rules.epoch_rows import EpochRows
from pilot.rules.intervals import WORD, OrderedPlaces, Places, PlaceSet


class Disk:
    """A set of shards; clients that have the same ones share it. `flags` has b"1" for each of them."""

    def __init__(self, flags: bytes) -> None:
        self.flags, self.size = flags, flags.count(b"1")
        self._places: dict[EpochRows, Places] = {}

    def places(self, epoch: EpochRows) -> Places:
        """Where the shards stand in the epoch's order, without a look at all of the order.

        A small disk's are looked up, a large one's are found as they are asked for: the first round of
        an epoch would else cost a walk over all shards for each disk.
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


class Disks:
    """The disks of all clients of a run that trains on the shards 0..num_shards-1."""

    def __init__(self, num_shards: int) -> None:
        self.everything = Disk(b"1" * num_shards)
        self._disks = {self.everything.flags: self.everything}
        self._clients: dict[str, tuple[Disk, ...]] = {}

    def register(self, client: str, shards: Collection[int], *, fetches: bool) -> None:
        """`client` has `shards` on its disk, and no others; it can fetch those if it `fetches`."""
        flags = bytearray(b"0" * self.everything.size)
        for shard in shards:
            if 0 <= shard < self.everything.size:
                flags[shard] = ord("1")
        disk = self._disks.setdefault(bytes(flags), Disk(bytes(flags)))
        self._clients[client] = (disk, self.everything) if fetches else (disk,)
        if len(self._disks) > 2 * len(self._clients) + 1:  # some are nobody's any more
            in_use = [self.everything, *(disks[0] for disks in self._clients.values())]
            self._disks = {disk.flags: disk for disk in in_use}

    def of(self, client: str) -> tuple[Disk, ...]:
        """Where rows for the client may come from, best first, the last one the widest.

        Any shard, for a client that never said what it has.
        """
        return self._clients.get(client, (self.everything,))
