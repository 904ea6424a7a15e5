"""What the ledger costs per round: leases and commits of many clients over many shards.

python -m benchmarks.ledger
python -m benchmarks.ledger --shards 1000,10000 --clients 1000 --rounds 15

Each round leases rows to every client, commits half of each lease, and asks what the server asks:
is anything free, for whom, how far is the run, and what does a snapshot keep. Sizes are interleaved
round by round, figures are medians over the rounds; `first_round_ms` is the first round of an epoch, in
which each set of shards is looked for in the epoch's order. Disks: `all` (every client has every shard),
`half` and `few` (each has a random half, or one in twenty, of its own: no two alike) and `own` (each has
shards that nobody else has). `done` is the share of the epoch's shards that are committed before the
first round.

Lines are JSON, one per setting; the last one has the ratios of the biggest number of shards to the smallest
(about 1 where the cost does not grow with the shards), and what leasing and the first round cost at the worst.
"""

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nanochat.common import ArgumentParser, run_command_line
from nanochat.rows.stream import shard_order
from pilot.rules.ledger import Ledger
from pilot.segment import Segment

SHARD_ROWS = 50_000
LEASE_ROWS = 1024  # 32 steps of 32 rows; half of it is used
STEP_ROWS = 32
EPOCHS = 2
PARTS = {"half": 2, "few": 20}  # disks of which no two are alike → shards over shards a disk
CASES = [("all", 0.0), ("all", 0.9), ("half", 0.0), ("few", 0.0), ("own", 0.0)]


@dataclass
class Setting:
    """A ledger in use; `times_s` has what each operation took, round by round."""

    shards: int
    clients: int
    disks: str
    done: float
    times_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        started = int(self.done * self.shards)

        def order(epoch: int) -> list[int]:
            return shard_order(self.shards, epoch, seed=0)

        empty = Ledger(num_shards=self.shards, epochs=EPOCHS, shard_order=order)
        state = empty.to_state() | {
            "row_counts": [[shard, SHARD_ROWS] for shard in range(self.shards)],
            "committed": [[0, shard, "gone", [[0, SHARD_ROWS]]] for shard in order(0)[:started]],
        }
        self.ledger = Ledger.from_state(state, shard_order=order)
        self.names = [f"client_{number}" for number in range(self.clients)]
        shards = [self._shards_of(number) for number in range(self.clients)]
        self._time("register", lambda: self._register(shards))

    def _register(self, shards: list[list[int]]) -> None:
        for name, own in zip(self.names, shards, strict=True):
            self.ledger.register(name, own)

    def _shards_of(self, number: int) -> list[int]:
        if self.disks == "all":
            return list(range(self.shards))
        if self.disks in PARTS:
            size = self.shards // PARTS[self.disks]
            return random.Random(number).sample(range(self.shards), size)
        return list(range(number, self.shards, self.clients))

    def _time(self, what: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.times_s[what].append(time.perf_counter() - began)
        return result

    def round(self) -> None:
        ledger, wanted = self.ledger, dict.fromkeys(self.names, LEASE_ROWS)
        self._time("free_for", lambda: [ledger.free_for(name) for name in self.names])
        leases = self._time("lease", lambda: ledger.lease_all(wanted, step_rows=STEP_ROWS))
        assert len(leases) == self.clients, f"only {len(leases)} clients have a lease"
        replies = [(lease.lease_id, _half(lease.segments)) for lease in leases.values()]
        self._time("commit", lambda: [ledger.commit(i, used, {}) for i, used in replies])
        self.times_s["round"].append(self.times_s["lease"][-1] + self.times_s["commit"][-1])
        self._time("exhausted", lambda: ledger.exhausted)
        self._time("progress", ledger.progress)
        self._time("to_state", ledger.to_state)

    def result(self) -> dict[str, Any]:
        times = {f"{what}_ms": round(1e3 * t, 4) for what, t in self.median_s().items()}
        names = {"shards": self.shards, "clients": self.clients, "disks": self.disks}
        first = {"first_round_ms": round(1e3 * self.first_round_s, 4)}
        return {**names, "done": self.done, "rounds": len(self.times_s["round"]), **first, **times}

    @property
    def first_round_s(self) -> float:
        return sum(self.times_s[what][0] for what in ("free_for", "lease", "commit"))

    def median_s(self) -> dict[str, float]:
        return {what: statistics.median(times) for what, times in self.times_s.items()}


def _half(segments: tuple[Segment, ...]) -> list[Segment]:
    """The prefix of a lease that ends after half of its rows."""
    used, left = [], LEASE_ROWS // 2
    for segment in segments:
        rows = min(left, segment.rows or 0)
        if rows:
            used.append(replace(segment, end_row=segment.first_row + rows))
        left -= rows
    return used


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.ledger", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=_numbers, default=[1000, 10_000])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    ratios: dict[str, dict[str, float]] = {}
    worst_s = {"lease": 0.0, "first_round": 0.0}
    for disks, done in CASES:
        settings = [Setting(shards, args.clients, disks, done) for shards in args.shards]
        for _ in range(args.rounds):
            for setting in settings:
                setting.round()
        for setting in settings:
            print(json.dumps(setting.result()), flush=True)
            worst_s["lease"] = max(worst_s["lease"], *setting.times_s["lease"])
            worst_s["first_round"] = max(worst_s["first_round"], setting.first_round_s)
        small, big = settings[0].median_s(), settings[-1].median_s()
        ratios[f"{disks}, {done:.0%} done"] = {
            what: round(big[what] / small[what], 2) for what in ("round", "lease", "commit")
        }
    worst = {f"worst_{what}_ms": round(1e3 * time_s, 1) for what, time_s in worst_s.items()}
    print(json.dumps({"shards": [args.shards[0], args.shards[-1]], "ratios": ratios, **worst}))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    run_command_line(main)
