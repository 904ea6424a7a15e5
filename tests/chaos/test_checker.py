"""Books made by hand: good ones pass, and each kind of bad one is found by its name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import checker
from benchmarks.chaos.checker import Books, Limits, Merged, Outage
from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.snapshot import write_snapshot
from pilot.run.state import Contribution, MergedReply, RoundRecord, RunState
from pilot.segment import Segment
from pilot.wire.messages import Fence

RUN, T = "run", 64
LIMITS = Limits(round_s=40.0, gap_s=20.0, finish_s=60.0, restart_s=30.0)


def reply(round_number: int, lease_id: int, *rows: tuple[int, int, int, int]) -> Merged:
    """`rows`: epoch, shard, first row, end row."""
    consumed = tuple(((epoch, shard), (first, end)) for epoch, shard, first, end in rows)
    return Merged("site-a", RUN, 1, round_number, lease_id, consumed)


def good() -> list[Books]:
    """Three rounds: two sites, then nobody, then one site that continues where the first was."""
    first = {(0, 0): [(0, 16)], (0, 1): [(0, 8)]}
    second = {(0, 0): [(0, 24)], (0, 1): [(0, 8)]}
    log = ((1, 1, 1), (1, 1, 2))
    merged = (reply(1, 1, (0, 0, 0, 16)), reply(1, 2, (0, 1, 0, 8)))
    return [
        Books(1, 1, 24 * T, merged, first, log),
        Books(2, 1, 24 * T, (), first, log),
        Books(3, 2, 32 * T, (reply(3, 5, (0, 0, 16, 24)),), second, (*log, (1, 3, 5))),
    ]


def changed(number: int, **values: Any) -> list[Books]:
    """The good books with other values in one round."""
    books = good()
    books[number - 1] = dataclasses.replace(books[number - 1], **values)
    return books


def all_of(books: Sequence[Books]) -> list[str]:
    return [
        *checker.check_rounds(books),
        *checker.check_fences(books, RUN),
        *checker.check_rows(books, T),
    ]


def test_good_books_have_no_violation() -> None:
    assert all_of(good()) == []
    assert all_of([]) == []


def taken_back(**values: Any) -> list[Books]:
    """The good books, after a fourth round that takes the third one's merge back."""
    first = good()[1]
    last = Books(4, 2, first.tokens, (), first.committed, first.log, (2, 3))
    return [*good(), dataclasses.replace(last, **values)]


def test_merge_that_is_taken_back_leaves_the_books_of_before_it() -> None:
    assert all_of(taken_back()) == []
    kept = good()[2]
    assert "ledger: round 4 counts 512 tokens for 0 rows of 64" in all_of(
        taken_back(tokens=kept.tokens)
    )
    assert any(
        "which no merged reply contains" in one
        for one in all_of(taken_back(committed=kept.committed))
    )
    assert "fences: the log in snapshot 4 differs from the replies merged so far" in all_of(
        taken_back(log=kept.log)
    )
    assert "rounds: round 4 has 1536 tokens, after 2048" in all_of(taken_back(takes_back=None))


@pytest.mark.parametrize(
    ("books", "found"),
    [
        (good()[:1] + good()[2:], "rounds: snapshot 2 belongs to round 3"),
        (changed(1, term=3), "rounds: round 2 has term 1, after term 3"),
        (changed(2, tokens=8 * T), "rounds: round 2 has 512 tokens, after 1536"),
        (
            changed(3, merged=(reply(2, 5, (0, 0, 16, 24)),)),
            "fences: round 3 merged ('run', 1, 2, 5)",
        ),
        (
            changed(3, merged=(reply(3, 5, (0, 0, 16, 24)), reply(3, 5))),
            "fences: round 3 merged ('run', 1, 3, 5) again",
        ),
        (
            changed(
                1,
                merged=(
                    reply(1, 1, (0, 0, 0, 16)),
                    reply(1, 2, (0, 1, 0, 8), (0, 0, 12, 16)),
                ),
            ),
            "rows: round 1 commits rows 12..16 of (0, 0) a second time",
        ),
        (
            changed(3, merged=(reply(3, 5, (0, 0, 8, 24)),)),
            "rows: round 3 commits rows 8..24 of (0, 0) a second time",
        ),
        (
            changed(3, merged=()),
            "rows: round 3 commits rows 16..24 of (0, 0), which no merged reply contains",
        ),
        (
            changed(3, committed={(0, 0): [(0, 24)]}),
            "ledger: round 3 has lost the committed rows 0..8 of (0, 1)",
        ),
        (
            changed(1, committed={(0, 0): [(0, 12)], (0, 1): [(0, 8)]}),
            "ledger: round 1 has lost the committed rows 12..16 of (0, 0)",
        ),
        (
            changed(3, committed={(0, 0): [(0, 16), (12, 24)], (0, 1): [(0, 8)]}),
            "ledger: round 3 lists rows twice in [(0, 0)]",
        ),
        (changed(3, tokens=31 * T), "ledger: round 3 counts 448 tokens for 8 rows of 64"),
        (
            changed(2, log=((1, 1, 1),)),
            "fences: the log in snapshot 2 differs from the replies merged so far",
        ),
    ],
)
def test_each_bad_book_is_found(books: list[Books], found: str) -> None:
    assert found in all_of(books)


def test_a_reply_of_another_run_or_of_a_later_term_is_found() -> None:
    strange = reply(3, 5, (0, 0, 16, 24))
    for other in ({"run": "another"}, {"term": 3}):
        books = changed(3, merged=(dataclasses.replace(strange, **other),))
        assert any(text.startswith("fences: round 3 merged") for text in all_of(books))


def test_books_are_read_from_snapshots_as_the_server_writes_them(tmp_path: Path) -> None:
    config = RunConfig.from_mapping({"run-name": RUN, "num-shards": 8})
    ledger = Ledger(num_shards=8, epochs=1, shard_order=lambda _epoch: range(8))
    lease = ledger.lease("site-a", 4)
    assert lease is not None
    shard = lease.segments[0].shard
    state = RunState(config=config, weights={}, ledger=ledger, total_tokens=10**6)
    fence = Fence(RUN, 1, 1, lease.lease_id)
    reply = MergedReply("site-a", fence, 4 * T, [Segment(0, shard, 0, 4)])
    record = RoundRecord(1, "min-duration", 1, 4 * T, 1.0, 2.0)
    state.absorb(record, [Contribution(reply, {}, norm=1.0, steps=1.0)], None)
    path = write_snapshot(tmp_path, state.to_snapshot(term=1), keep=3)
    rows = ((0, shard), (0, 4))
    merged = Merged("site-a", RUN, 1, 1, lease.lease_id, (rows,))
    expected = Books(1, 1, 4 * T, (merged,), {(0, shard): [(0, 4)]}, ((1, 1, lease.lease_id),))
    assert checker.read_books([path]) == [expected]
    assert all_of([expected]) == []


def event(kind: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": time, **fields}


def test_an_event_log_whose_terms_or_rounds_go_back_is_found() -> None:
    log = [
        event("run_started", 0.0, term=1),
        event("round_opened", 1.0, round=1),
        event("round_committed", 9.0, round_number=1),
        event("round_opened", 10.0, round=2),
        event("run_started", 20.0, term=2),
        event("round_opened", 21.0, round=2),
    ]
    assert list(checker.check_events(log)) == []
    again = [*log, event("run_started", 30.0, term=2)]
    assert list(checker.check_events(again)) == ["rounds: term 2 started after term 2"]
    for round_number in (1, 2):
        again = [*log, event("round_opened", 30.0, round=round_number)]
        assert list(checker.check_events(again)) == [f"rounds: round {round_number} opened after 2"]
    again = [*log, event("round_committed", 30.0, round_number=1)]
    assert list(checker.check_events(again)) == ["rounds: round 1 committed after 1"]


def test_a_stall_is_found_unless_an_outage_explains_it() -> None:
    log = [
        event("run_started", 0.0),
        event("round_opened", 5.0),
        event("round_committed", 44.0),
        event("round_opened", 63.0),
    ]
    assert list(checker.check_stalls(log, [], LIMITS)) == []
    log[2]["time"], log[3]["time"] = 46.0, 65.0
    assert list(checker.check_stalls(log, [], LIMITS)) == [
        "stall: 41.0 s after round_opened, where 40.0 s were allowed"
    ]
    end = [event("round_committed", 0.0), event("run_finished", 59.0)]
    assert list(checker.check_stalls(end, [], LIMITS)) == []
    end[1]["time"] = 61.0
    assert len(list(checker.check_stalls(end, [], LIMITS))) == 1
    frozen = Outage("freeze-serverapp", "server", 10.0, 12.0)
    assert list(checker.check_stalls(log, [frozen], LIMITS)) == []
    elsewhere = Outage("freeze-serverapp", "server", 50.0, 52.0)
    assert len(list(checker.check_stalls(log, [elsewhere], LIMITS))) == 1
    killed = Outage("kill-serverapp", "server", 46.5, 50.0)
    log[3]["time"] = 46.0 + 20.0 + 3.5 + 29.0
    assert len(list(checker.check_stalls(log, [killed], LIMITS))) == 1  # the first one
    log[3]["time"] += 2.0
    assert len(list(checker.check_stalls(log, [killed], LIMITS))) == 2


def test_limits_follow_from_the_configuration() -> None:
    limits = Limits.of({"round-max-duration": 30.0, "grace-max": 5.0}, restart_s=7.0)
    assert limits == Limits(round_s=45.0, gap_s=22.0, finish_s=81.0, restart_s=7.0)


def test_a_missed_target_a_process_left_and_another_bpb_are_found() -> None:
    books = good()
    assert list(checker.check_target(books, 32 * T)) == []
    assert list(checker.check_target(books, 40 * T)) == ["target: the run has 2048 of 2560 tokens"]
    assert list(checker.check_target([], 1)) == ["target: the run has 0 of 1 tokens"]
    assert list(checker.check_processes(["python x"])) == ["processes: left behind: python x"]
    assert list(checker.check_bpb(2.03, 2.0)) == []
    assert list(checker.check_bpb(2.03, None)) == []
    assert list(checker.check_bpb(None, 2.0)) == ["bpb: the final model was not scored"]
    for bpb in (2.05, 1.95):
        assert "more than 2% apart" in next(iter(checker.check_bpb(bpb, 2.0)))
    shared = checker.BPB_TOLERANCE["federation"]
    assert list(checker.check_bpb(2.019, 2.0, shared)) == []
    for bpb in (2.03, 1.97):
        assert "more than 1% apart" in next(iter(checker.check_bpb(bpb, 2.0, shared)))
