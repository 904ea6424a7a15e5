"""What must hold after a run, whatever happened during it: pure functions from books to violations.

The snapshots are trusted (their rename is the commit), the event log only for times: an event may be lost when
the disk is full. A violation is one sentence that begins with the rule it breaks:

    rounds      round numbers, terms and tokens only grow (unless a merge is taken back), one snapshot per round
    fences      every merged reply belongs to this run and round, and was merged once
    rows        no row committed twice; every committed row was in exactly one merged reply
    ledger      no committed row is lost again; tokens are rows times the row's length
    stall       no round and no gap between rounds is longer than `Limits` allows
    target      the run reached its tokens
    processes   no process that was started is left
    bpb         the final model is as good as that of the undisturbed run
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[int, int]  # (epoch, shard)
Interval = tuple[int, int]  # [first row, end row)
Rows = Mapping[Key, Sequence[Interval]]


@dataclass(frozen=True)
class Merged:
    """One reply that a snapshot lists as merged, and its rows."""

    client: str
    run: str
    term: int
    round_number: int
    lease_id: int
    consumed: tuple[tuple[Key, Interval], ...]

    @property
    def fence(self) -> tuple[str, int, int, int]:
        return (self.run, self.term, self.round_number, self.lease_id)


@dataclass(frozen=True)
class Books:
    """The content of one snapshot: the books after `round_number` rounds."""

    round_number: int
    term: int
    tokens: int
    merged: tuple[Merged, ...]  # in this round
    committed: Rows  # in all rounds so far
    log: tuple[tuple[int, int, int], ...]  # (term, round, lease) of all replies merged so far
    takes_back: tuple[int, int] | None = None  # first and last round whose merges this one undoes


@dataclass(frozen=True)
class Outage:
    """A fault that happened: when it struck, and when its target was back (wall clock, seconds)."""

    kind: str
    target: str
    began: float
    ended: float


@dataclass(frozen=True)
class Limits:
    """Bounds in seconds, computed from the configuration (`of`).

    `round_s`: from a round's opening to its commit. `gap_s`: between a round's commit and the next opening.
    `finish_s`: from the last commit to the end of the run, in which the last model is scored.
    `restart_s`: from the submission of a ServerApp to its first round, hello included.
    """

    round_s: float
    gap_s: float
    finish_s: float
    restart_s: float

    @staticmethod
    def of(config: Mapping[str, Any], *, restart_s: float) -> "Limits":
        """A round ends at `round-max-duration` and waits `grace-max` for replies; between rounds the server
        waits at most 15 s (`return_s`, pilot/rules/rounds.py) for clients that may return. A client without
        an order is back within a restart."""
        slack_s = 10.0  # outer step, snapshot, ticks of a busy machine
        return Limits(
            round_s=float(config["round-max-duration"]) + float(config["grace-max"]) + slack_s,
            gap_s=15.0 + restart_s,
            finish_s=3 * (15.0 + float(config["grace-max"]) + restart_s),  # three attempts
            restart_s=restart_s,
        )


def read_books(snapshots: Iterable[Path]) -> list[Books]:
    """The books in directories `snapshots`, by round."""
    return sorted(map(_read, snapshots), key=lambda books: books.round_number)


def _read(snapshot: Path) -> Books:
    state = json.loads((snapshot / "state.json").read_text(encoding="utf-8"))
    lines = (snapshot / "merged.jsonl").read_text(encoding="utf-8").splitlines()
    log: list[dict[str, Any]] = []
    takes_back = None
    for entry in map(json.loads, lines):
        if "takes_back" in entry:
            first, last = entry["takes_back"]
            log = [one for one in log if not first <= one["round"] <= last]
            takes_back = (first, last) if entry["round"] == state["round"] else None
        else:
            log.append(entry)
    return Books(
        round_number=state["round"],
        term=state["term"],
        tokens=state["tokens"],
        merged=tuple(map(_merged, state["merged"])),
        committed={
            (epoch, shard): [(first, end) for first, end in intervals]
            for epoch, shard, _, intervals in state["ledger"]["committed"]
        },
        log=tuple((entry["term"], entry["round"], entry["lease"]) for entry in log),
        takes_back=takes_back,
    )


def _merged(entry: Mapping[str, Any]) -> Merged:
    fence = entry["fence"]
    return Merged(
        client=entry["client"],
        run=fence["run"],
        term=fence["term"],
        round_number=fence["round_number"],
        lease_id=fence["lease_id"],
        consumed=tuple(
            ((epoch, shard), (first, end)) for epoch, shard, first, end in entry["consumed"]
        ),
    )


def check_rounds(books: Sequence[Books]) -> Iterator[str]:
    """Every round has one snapshot; terms and tokens never decrease."""
    for number, one in enumerate(books, start=1):
        if one.round_number != number:
            yield f"rounds: snapshot {number} belongs to round {one.round_number}"
            return
    for before, after in itertools.pairwise(books):
        if after.term < before.term:
            yield f"rounds: round {after.round_number} has term {after.term}, after term {before.term}"
        if after.tokens < before.tokens and after.takes_back is None:
            yield f"rounds: round {after.round_number} has {after.tokens} tokens, after {before.tokens}"


def check_events(events: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """In the order of the log: terms grow, rounds grow within a term, none is opened that was committed."""
    term = opened = committed = 0
    for event in events:
        match event["event"]:
            case "run_started":
                if event["term"] <= term:
                    yield f"rounds: term {event['term']} started after term {term}"
                term, opened = event["term"], 0
            case "round_opened":
                if event["round"] <= max(opened, committed):
                    yield f"rounds: round {event['round']} opened after {max(opened, committed)}"
                opened = event["round"]
            case "round_committed":
                if event["round_number"] <= committed:
                    yield f"rounds: round {event['round_number']} committed after {committed}"
                committed = event["round_number"]


def check_fences(books: Sequence[Books], run: str) -> Iterator[str]:
    """Merged replies belong to this run, to their round, to a term that had begun, and were merged once."""
    seen: set[tuple[str, int, int, int]] = set()
    for one in books:
        if one.takes_back is not None:
            first, last = one.takes_back
            seen = {fence for fence in seen if not first <= fence[2] <= last}
        for reply in one.merged:
            where = f"round {one.round_number} merged {reply.fence}"
            if reply.run != run or reply.round_number != one.round_number or reply.term > one.term:
                yield f"fences: {where}"
            if reply.fence in seen:
                yield f"fences: {where} again"
            seen.add(reply.fence)
        if sorted(one.log) != sorted(fence[1:] for fence in seen):
            yield f"fences: the log in snapshot {one.round_number} differs from the replies merged so far"


def check_rows(books: Sequence[Books], row_tokens: int) -> Iterator[str]:
    """Round by round, the ledger grows by exactly the rows of the merged replies, none of them twice."""
    before: Rows = {}
    tokens = 0
    after: dict[int, tuple[Rows, int]] = {0: (before, tokens)}  # round → what it left
    for one in books:
        name = f"round {one.round_number}"
        if one.takes_back is not None:
            before, tokens = after.get(one.takes_back[0] - 1, (before, tokens))
        now: dict[Key, list[Interval]] = {key: list(intervals) for key, intervals in before.items()}
        merged = [piece for reply in one.merged for piece in reply.consumed]
        for key, (first, end) in merged:
            if any(first < other_end and other < end for other, other_end in now.get(key, [])):
                yield f"rows: {name} commits rows {first}..{end} of {key} a second time"
            now.setdefault(key, []).append((first, end))
        yield from _difference(name, now, one.committed)
        if overlapping := [key for key, rows in one.committed.items() if _overlaps(rows)]:
            yield f"ledger: {name} lists rows twice in {overlapping}"
        rows = _count(one.committed) - _count(before)
        if one.tokens - tokens != rows * row_tokens:
            yield f"ledger: {name} counts {one.tokens - tokens} tokens for {rows} rows of {row_tokens}"
        before, tokens = after[one.round_number] = one.committed, one.tokens


def _difference(name: str, expected: Rows, found: Rows) -> Iterator[str]:
    for key in sorted({*expected, *found}):
        wanted, there = _union(expected.get(key, [])), _union(found.get(key, []))
        for first, end in _minus(wanted, there):
            yield f"ledger: {name} has lost the committed rows {first}..{end} of {key}"
        for first, end in _minus(there, wanted):
            yield f"rows: {name} commits rows {first}..{end} of {key}, which no merged reply contains"


def check_target(books: Sequence[Books], total_tokens: int) -> Iterator[str]:
    """The run has reached its tokens."""
    tokens = books[-1].tokens if books else 0
    if tokens < total_tokens:
        yield f"target: the run has {tokens} of {total_tokens} tokens"


def check_stalls(
    events: Iterable[Mapping[str, Any]], outages: Sequence[Outage], limits: Limits
) -> Iterator[str]:
    """Between two events of the round loop no more time passes than the limits and the outages allow.

    Added to a limit: the part of each outage that lies within the interval, and a restart for each death of the
    server or the SuperLink in it.
    """
    marks = [
        (float(event["time"]), str(event["event"]))
        for event in events
        if event["event"] in ("run_started", "round_opened", "round_committed", "run_finished")
    ]
    for (began, kind), (ended, next_kind) in itertools.pairwise(marks):
        allowed_s = limits.round_s if kind == "round_opened" else limits.gap_s
        if next_kind == "run_finished":
            allowed_s = limits.finish_s
        hit = [outage for outage in outages if outage.began < ended and began < outage.ended]
        allowed_s += sum(min(ended, one.ended) - max(began, one.began) for one in hit)
        allowed_s += limits.restart_s * sum(one.kind in RESTARTING for one in hit)
        if ended - began > allowed_s:
            yield f"stall: {ended - began:.1f} s after {kind}, where {allowed_s:.1f} s were allowed"


# faults after which a ServerApp is submitted again
RESTARTING = ("kill-serverapp", "kill-superlink", "disk-full")


def check_processes(left: Iterable[str]) -> Iterator[str]:
    """`left`: command lines of processes that are still running."""
    for command in left:
        yield f"processes: left behind: {command}"


# By `batch-of`: with a batch of each client, who is there decides how many steps a run has.
BPB_TOLERANCE: Mapping[str, float] = {"client": 0.02, "federation": 0.01}


def check_bpb(
    bpb: float | None, undisturbed: float | None, tolerance: float = BPB_TOLERANCE["client"]
) -> Iterator[str]:
    """The final bits per byte are within `tolerance` of the undisturbed run's."""
    if bpb is None:
        yield "bpb: the final model was not scored"
    elif undisturbed is not None and abs(bpb - undisturbed) > tolerance * undisturbed:
        yield f"bpb: {bpb:.4f}, undisturbed {undisturbed:.4f}: more than {tolerance:.0%} apart"


# -- sets of rows as intervals -----------------------------------------------------------------------


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted, disjoint, not touching."""
    merged: list[Interval] = []
    for first, end in sorted(intervals):
        if first >= end:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def _minus(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Rows of `intervals` that are not in `others`; both as `_union` gives them."""
    left = []
    for first, end in intervals:
        at = first
        for other, other_end in others:
            if other_end <= at or other >= end:
                continue
            if other > at:
                left.append((at, other))
            at = max(at, other_end)
        if at < end:
            left.append((at, end))
    return left


def _overlaps(intervals: Iterable[Interval]) -> bool:
    ordered = sorted(intervals)
    return any(second[0] < first[1] for first, second in itertools.pairwise(ordered))


def _count(rows: Rows) -> int:
    return sum(end - first for intervals in rows.values() for first, end in intervals)
