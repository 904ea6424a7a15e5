"""Runs that anything may happen to, rehearsed by the hundred: each ends, with books that are right.

`PILOT_REHEARSALS=1000 pytest tests/pilot/rehearse/test_invariants.py` tries that many, and others each time. A
seed that fails is in the name of its test: `PILOT_REHEARSAL=1234 pytest …` tries that one alone.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.chaos import checker
from pilot.config import RunConfig
from pilot.rehearse.draw import faults
from pilot.rehearse.machine import Machine, Physics
from pilot.rehearse.run import Rehearsal, rehearse
from pilot.run.events import EVENTS_FILE, read_events

_MANY = int(os.environ.get("PILOT_REHEARSALS", "0"))
_ONE = os.environ.get("PILOT_REHEARSAL", "")
_FIRST = random.SystemRandom().randrange(10**6) if _MANY else 0
SEEDS = [int(_ONE)] if _ONE else list(range(_FIRST, _FIRST + (_MANY or 40)))
ROW_TOKENS, FAULTS_S = 8, 300.0
MEMORY = Path("/dev/shm")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """In memory where there is such a place: a rehearsal writes a hundred snapshots that nobody keeps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        yield Path(directory)
    torch.set_num_threads(threads)


def rehearsed(seed: int, run_dir: Path) -> Rehearsal:
    """A run of one to four clients, struck every few seconds for five minutes, and then left in peace."""
    rng = random.Random(seed)
    config = RunConfig.from_mapping(
        {
            "run-name": "r",
            "depth": 1,
            "vocab-size": 300,
            "sequence-len": ROW_TOKENS,
            "total-batch-size": 8 * ROW_TOKENS,
            "device-batch-size": 2,
            "num-shards": 4,
            "epochs": 6,
            "total-tokens": 6400,
            "target-tokens": rng.choice([0, 0, 1000]),
            "round-min-duration": rng.choice([8.0, 15.0]),
            "round-max-duration": 30.0,
            "round-steps": rng.choice([0, 0, 0, 3]),
            "quorum": rng.choice([1, 2]),
            "min-clients": 1,
            "grace-max": 20.0,
            "heartbeat": 1.0,
            "eval-rows": 20,
            "clients-timeout": 3600.0,
            "cooling-time": rng.choice([0.0, 60.0]),
            "snapshot-keep": 10_000,
            "outer-lr": rng.choice(["auto", 0.7]),
            "wire-up": rng.choice(["float32", "int8", "int4"]),
        }
    )
    names = [f"c{i}" for i in range(rng.choice([1, 2, 4]))]
    machines = [
        Machine(
            name=name,
            tokens_per_s=rng.choice([10.0, 20.0, 40.0]),
            boot_s=5.0,
            start_s=rng.choice([0.5, 3.0]),
        )
        for name in names
    ]
    trace = faults(names, seconds=FAULTS_S, every_s=rng.choice([4.0, 10.0, 25.0]), seed=seed)
    physics = Physics(config, order_bytes=10**6, reply_bytes=10**6, shard_rows=60)
    return rehearse(config, machines, trace, run_dir, physics=physics, seed=seed, until_s=10_000.0)


def violations(run: Rehearsal, run_dir: Path) -> list[str]:
    books = checker.read_books((run_dir / "snapshots").glob("round-*"))
    found = [
        *checker.check_rounds(books),
        *checker.check_events(read_events(run_dir / EVENTS_FILE)),
        *checker.check_fences(books, "r"),
        *checker.check_rows(books, ROW_TOKENS),
    ]
    if run.failure:
        found.append(f"the run failed: {run.failure}")
    elif not run.state.finished:
        found.append(f"the run has {run.state.tokens} tokens after {run.seconds:.0f} s")
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_ends_with_right_books_whatever_happens_to_it(seed: int, run_dir: Path) -> None:
    assert violations(rehearsed(seed, run_dir), run_dir) == []


def test_the_same_seed_gives_the_same_events_byte_for_byte(run_dir: Path) -> None:
    found = []
    for name in ("one", "other"):
        (run_dir / name).mkdir()
        rehearsed(7, run_dir / name)
        found.append((run_dir / name / EVENTS_FILE).read_bytes())
    assert found[0] == found[1] and found[0].count(b"\n") > 50
