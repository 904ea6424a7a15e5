"""The books of a finished run, against what its replies said."""

from pathlib import Path

from benchmarks.chaos.micro import MICRO
from pilot.run.snapshot import latest_snapshot

from .processes import events


def check_books(base: Path, run: str) -> None:
    """Rows committed per shard are those of the accepted replies; none twice, none of validation."""
    trained: dict[tuple[int, int], list[int]] = {}
    for reply in events(base, run, "reply"):
        for epoch, shard, first, end in reply["consumed"]:
            trained.setdefault((epoch, shard), []).extend(range(first, end))
    snapshot = latest_snapshot(base / "runs" / run / "snapshots", report=print)
    assert snapshot is not None
    ledger = snapshot.state["ledger"]
    committed = {
        (epoch, shard): [row for first, end in intervals for row in range(first, end)]
        for epoch, shard, _, intervals in ledger["committed"]
    }
    assert {key: sorted(rows) for key, rows in trained.items()} == committed
    assert all(shard < MICRO["num-shards"] for _, shard in committed)  # validation is shard 8
    rows = sum(len(rows) for rows in committed.values())
    assert rows * MICRO["sequence-len"] == snapshot.state["tokens"]
