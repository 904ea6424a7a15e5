"""The books of a finished run, against what its replies said."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos.micro import MICRO
from pilot.run.snapshot import latest_snapshot

from .processes import events


def check_rows(
    merged: Iterable[Mapping[str, Any]],
    committed: Iterable[tuple[int, int, Iterable[tuple[int, int]]]],
    *,
    tokens: int,
    row_tokens: int,
) -> None:
    """Each row of the `merged` replies was merged once, and these are the `committed` ones and the `tokens`.

    `committed`: (epoch, shard, intervals of rows).
    """
    replies = list(merged)
    rows = [
        (epoch, shard, row)
        for one in replies
        for epoch, shard, first, end in one["consumed"]
        for row in range(first, end)
    ]
    in_books = {
        (epoch, shard, row)
        for epoch, shard, intervals in committed
        for first, end in intervals
        for row in range(first, end)
    }
    assert len(rows) == len(set(rows)) and set(rows) == in_books
    assert tokens == len(rows) * row_tokens == sum(one["tokens"] for one in replies)


def rows_in(state: Mapping[str, Any]) -> list[tuple[int, int, Any]]:
    """What a snapshot's `state` says is committed, as `check_rows` takes it."""
    return [(epoch, shard, ranges) for epoch, shard, _, ranges in state["ledger"]["committed"]]


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
