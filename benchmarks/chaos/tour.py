"""One run of a federation with faults, or without, and what came of it."""

import contextlib
import json
import math
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos import checker
from benchmarks.chaos.checker import Books, Limits, Outage
from benchmarks.chaos.faults import Fault
from benchmarks.chaos.injector import Injector
from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import BIN, ROOT
from benchmarks.chaos.topology import Federation
from benchmarks.idle import accounts
from pilot.config import DEFAULTS
from pilot.run.events import read_events

# What differs from MICRO: sites come and go, rounds are short, the checker reads every snapshot.
CONFIG: dict[str, Any] = MICRO | {
    "epochs": 64,
    "eval-rows": 512,
    "min-clients": 1,
    "quorum": 1,
    "round-max-duration": 60.0,
    "grace-max": 30.0,
    "clients-timeout": 180.0,
    "cooling-time": 15.0,
    "client-processes": 1,
    "client-threads": 1,
    "heartbeat": 0.5,
    "snapshot-keep": 100_000,
}
RESTART_S = 60.0  # of a ServerApp on a busy machine: submit, import, hello, first orders


def prepare(base: Path) -> None:
    """The built-in corpus and its tokenizer in `base`, made by a process of its own."""
    base.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base)}
    subprocess.run(
        [BIN / "python", "-m", "benchmarks.chaos.prepare"], cwd=ROOT, env=env, check=True
    )


@dataclass(frozen=True)
class Tour:
    """A run and the faults planned for it; without faults it is an undisturbed run."""

    name: str  # of the run
    sites: tuple[str, ...]
    total_tokens: int
    round_tokens: int
    seed: int = 0
    plan: tuple[Fault, ...] = ()
    timeout_s: float = 600.0  # after the last fault
    more: Mapping[str, Any] = field(default_factory=dict)  # run-config keys that differ

    @property
    def config(self) -> dict[str, Any]:
        return CONFIG | {
            "run-name": self.name,
            "seed": self.seed,
            "total-tokens": self.total_tokens,
            "target-tokens": self.round_tokens,
            **self.more,
        }


@dataclass(frozen=True)
class Outcome:
    """The result of a tour. `commits` are (wall-clock seconds, round, tokens so far) of each commit."""

    finished: bool
    began: float  # wall clock: the first round opens
    commits: list[tuple[float, int, int]]
    bpb: float | None
    books: list[Books]
    events: list[dict[str, Any]]
    outages: list[Outage]
    missed: list[Fault]
    violations: list[str]

    @property
    def ended(self) -> float:
        """Wall clock: the first commit after the last fault, since no fault disturbs what comes later.

        Without faults, the last commit.
        """
        calm = max((outage.ended for outage in self.outages), default=math.inf)
        return next((at for at, _, _ in self.commits if at >= calm), self._last[0])

    @property
    def tokens(self) -> int:
        """Tokens committed until `ended`."""
        return max((tokens for at, _, tokens in self.commits if at <= self.ended), default=0)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(1e-9, self.ended - self.began)

    @property
    def _last(self) -> tuple[float, int, int]:
        return self.commits[-1] if self.commits else (self.began, 0, 0)


def run(tour: Tour, directory: Path, base: Path, stop: threading.Event | None = None) -> Outcome:
    """Start everything, inject the faults, wait for the run's end, end everything, check.

    `stop` ends it early, from another thread.
    """
    stop = stop or threading.Event()
    with Federation(directory, base, tour.config, tour.sites) as federation:
        for _ in range(
            1200
        ):  # until the first round opens; the checker reports it if it never does
            if stop.is_set() or federation.error or _events(federation.run_dir, "round_opened"):
                break
            time.sleep(0.1)
        injector = Injector(federation, list(tour.plan))
        injector.run(max((fault.at_s for fault in tour.plan), default=0.0), stop)
        finished = federation.wait(tour.timeout_s, stop)
        left = federation.leave()
    events = list(read_events(federation.run_dir / "events.jsonl"))
    books = checker.read_books((federation.run_dir / "snapshots").glob("round-*"))
    times = [event["time"] for event in events if event["event"] == "round_opened"]
    commits = [
        (event["time"], event["round_number"], event["total_tokens"])
        for event in events
        if event["event"] == "round_committed"
    ]
    violations = [
        *injector.violations,
        *([] if finished else [f"target: the run is not finished after {tour.timeout_s:.0f} s"]),
        *check(tour, books, events, injector.outages, left),
    ]
    return Outcome(
        finished=finished,
        began=times[0] if times else 0.0,
        commits=commits,
        bpb=_final_bpb(events, books),
        books=books,
        events=events,
        outages=injector.outages,
        missed=injector.missed,
        violations=violations,
    )


def check(
    tour: Tour,
    books: Sequence[Books],
    events: Sequence[Mapping[str, Any]],
    outages: Sequence[Outage],
    left: Sequence[str],
) -> list[str]:
    """All violations but that of the final bpb, which needs a second run."""
    config = {**DEFAULTS, **tour.config}
    return [
        *checker.check_rounds(books),
        *checker.check_events(events),
        *checker.check_fences(books, tour.name),
        *checker.check_rows(books, int(config["sequence-len"])),
        *checker.check_target(books, tour.total_tokens),
        *checker.check_stalls(events, outages, Limits.of(config, restart_s=RESTART_S)),
        *checker.check_processes(left),
    ]


def figures(
    outcome: Outcome,
    undisturbed: Outcome | None,
    *,
    sites: Sequence[str],
    batch_of: str = str(DEFAULTS["batch-of"]),
) -> dict[str, Any]:
    """The last line of the benchmark; ratios and times that cannot be computed are None. `batch_of` of the
    run: on it depends how far bpb may be off."""
    violations = list(outcome.violations)
    if undisturbed is not None:
        violations += checker.check_bpb(
            outcome.bpb, undisturbed.bpb, checker.BPB_TOLERANCE[batch_of]
        )
        violations += [f"undisturbed run: {text}" for text in undisturbed.violations]
    kinds = [outage.kind for outage in outcome.outages]
    recoveries = [
        recovery for outage in outcome.outages if (recovery := _recovery_s(outcome, outage))
    ]
    rate = capacity = None
    if undisturbed is not None and undisturbed.tokens and outcome.tokens:
        capacity = surviving_capacity(outcome, sites)
        rate = outcome.tokens_per_s / undisturbed.tokens_per_s
    opened = sum(event["event"] == "round_opened" for event in outcome.events)
    useful = sum(bool(books.merged) for books in outcome.books)
    return {
        "faults": len(kinds),
        "by_kind": {kind: kinds.count(kind) for kind in sorted({*kinds})},
        "missed": len(outcome.missed),
        "violations": violations,
        "rounds": len(outcome.books),
        "rounds_lost": opened - useful,
        "rows_committed": sum(
            end - first
            for rows in (outcome.books[-1].committed.values() if outcome.books else ())
            for first, end in rows
        ),
        "duration_s": round(outcome.ended - outcome.began, 1),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "tokens_per_s_undisturbed": undisturbed and round(undisturbed.tokens_per_s, 1),
        "throughput_ratio_raw": rate and round(rate, 3),
        "surviving_capacity": capacity and round(capacity, 3),
        "throughput_ratio": rate and capacity and round(rate / capacity, 3),
        "recovery_median_s": round(statistics.median(recoveries), 1) if recoveries else None,
        "recovery_worst_s": round(max(recoveries), 1) if recoveries else None,
        "participation": participation(outcome, sites),
        "idle": accounts(outcome.events),
        "bpb": outcome.bpb,
        "bpb_undisturbed": undisturbed.bpb if undisturbed else None,
    }


def surviving_capacity(outcome: Outcome, sites: Sequence[str]) -> float:
    """The share of site-seconds, 0..1, in which a site could train: it and all that it depends on were up.

    A fault costs the time until its target is back (restarted, thawed, or reachable), whatever the product
    makes of it. A slow line, a bad reply and a killed worker cost nothing, nor does a missing Redis: training
    continues without it.
    """
    whole = len(sites) * (outcome.ended - outcome.began)
    lost = 0.0
    for site in sites:
        hit = [
            (max(outage.began, outcome.began), min(outage.ended, outcome.ended))
            for outage in outcome.outages
            if _takes(outage, site)
        ]
        at = outcome.began
        for began, ended in sorted(hit):
            lost += max(0.0, ended - max(at, began))
            at = max(at, ended)
    return 1 - lost / whole if whole > 0 else 0.0


def participation(outcome: Outcome, sites: Sequence[str]) -> float | None:
    """The share of clients with work in a merge, 0..1, of those that were up while the round ran, all rounds.

    None if no round ended while a client was up.
    """
    opened: dict[int, float] = {}
    spans: dict[
        int, tuple[float, float]
    ] = {}  # round → when it was opened for the last time, and ended
    for event in outcome.events:
        if event["event"] == "round_opened":
            opened[event["round"]] = event["time"]
        elif event["event"] == "round_ended" and event["round"] in opened:
            spans[event["round"]] = (opened[event["round"]], event["time"])
    up = merged = 0
    for books in outcome.books:
        if books.round_number not in spans or books.takes_back:
            continue
        began, ended = spans[books.round_number]
        hit = [o for o in outcome.outages if o.began < ended and o.ended > began]
        alive = {site for site in sites if not any(_takes(outage, site) for outage in hit)}
        up += len(alive)
        merged += len(alive & {reply.client for reply in books.merged})
    return round(merged / up, 3) if up else None


def _takes(outage: Outage, site: str) -> bool:
    what, _, whom = outage.kind.partition("-")
    if whom == "redis" or what in ("reply", "delay"):
        return False
    return outage.target in (site, "server")


def _recovery_s(outcome: Outcome, outage: Outage) -> float | None:
    """Seconds from a fault to the next commit with work of the site that was hit; None if there was none.

    If the fault hit no site in particular, work of any site counts.
    """
    merged = {
        books.round_number: {reply.client for reply in books.merged} for books in outcome.books
    }
    for at, number, _ in outcome.commits:
        clients = merged.get(number, set())
        if at > outage.began and clients and outage.target in ("server", *clients):
            return at - outage.began
    return None


def _final_bpb(events: Sequence[Mapping[str, Any]], books: Sequence[Books]) -> float | None:
    """Validation bits per byte of the last model, if all validation rows were scored."""
    if not books:
        return None
    scores = [
        event["val_bpb"]
        for event in events
        if event["event"] == "validation"
        and event["round"] == books[-1].round_number
        and event["complete"]
    ]
    return scores[-1] if scores else None


def _events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError):
        return [event for event in read_events(run_dir / "events.jsonl") if event["event"] == kind]
    return []


def journal(outcome: Outcome) -> str:
    """The faults that happened, one JSON line each, to find the reason of a violation."""
    return "".join(json.dumps(asdict(outage)) + "\n" for outage in outcome.outages)
