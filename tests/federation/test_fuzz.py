"""Replies spoilt in every way that a header and its parts can be, in whole runs: the run goes on, and its books
are right.

`PILOT_FUZZ_REPLIES=10000 pytest tests/federation/test_fuzz.py` spoils that many, and others each time.
"""

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pilot.run.snapshot import latest_snapshot
from pilot.run.state import RunState
from pilot.wire.codec import encode
from pilot.wire.jsonable import header_text
from pilot.wire.messages import TrainOrder, from_header, to_header
from pilot.wire.records import from_records

from .books import check_rows
from .scripted import ROW_TOKENS, FastClock, ScriptedSite, Server, scripted_config

REPLIES = int(os.environ.get("PILOT_FUZZ_REPLIES", "0"))
SITES, ROUNDS = 6, 4
A_RUN = SITES * ROUNDS
MAX_EVENT_BYTES = 20_000

ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    5e-324,
    1e-300,
    1e15,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "x" * 2_000_000,
    "lease used up",
    "\ud800",
    "a\x1b[2J\r\nfake\u2028line",
    "²",
    "9" * 5000,
    "../../etc",
    [],
    {},
    [[]],
    [[0, 1, 2]],
    [[0, 0, 0, 2**40]],
    [[0, 0, 0, -1]],
    [[-5, -5, -5, -5]],
    [[0, 0, 0, 4]] * 1000,
    [[shard, 24] for shard in range(1000)],
    [[0, 1, 1e12, 2]],
    [[0, 1, 0.0, 2], [0, 1, 1.5, 2]],
    [[0, 2**40, math.nan, 2]],
    [[0, 1, 1.5, -2]] * 500,
    [0] * 100_000,
    {"a": {"b": [None]}},
]
DTYPES = [
    "float32",
    "bfloat16",
    "int8",
    "int4",
    "sparse",
    "float64",
    "",
    "object",
    "x" * 100_000,
    "\ud800",
]
SIZES = [0, 1, 2, 5, 2**31, 2**62, 2**63 - 1]
NAMES = ["w", "b", "", "x" * 100_000, "__metadata__", "../w", "\ud800"]

spoils = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 60), st.sampled_from(ODD)),
    st.tuples(st.just("set"), st.integers(0, 60), st.integers() | st.floats() | st.text()),
    st.tuples(st.just("drop"), st.integers(0, 60), st.none()),
    st.tuples(
        st.just("cut"), st.integers(0, 600), st.sampled_from(["", "}", "\x00", "[" * 50_000])
    ),
    st.tuples(st.just("shape"), st.booleans(), st.lists(st.sampled_from(SIZES), max_size=9)),
    st.tuples(st.just("dtype"), st.booleans(), st.sampled_from(DTYPES)),
    st.tuples(st.just("name"), st.booleans(), st.sampled_from(NAMES)),
    st.tuples(st.just("data"), st.booleans(), st.integers(0, 40)),
    st.tuples(st.just("values"), st.booleans(), st.floats(width=32)),
    st.tuples(st.just("record"), st.booleans(), st.sampled_from(["config", "parts", "header"])),
    st.tuples(st.just("unreadable"), st.integers(0, 200), st.integers(0, 255)),
    st.tuples(st.just("raise"), st.none(), st.sampled_from(["", "x" * 2_000_000, "\ud800\n"])),
)
Spoil = tuple[str, Any, Any]


class SpoiltSite(ScriptedSite):
    """A scripted site whose answers are good ones, each spoilt in the next of `spoils`."""

    spoils: list[Spoil]
    hellos: Sequence[Spoil] = ()  # the same for what it answers to the first question

    def __call__(self, kind: str, content: RecordDict) -> Any:
        order = from_header(from_records(content)[0])
        if not isinstance(order, TrainOrder) and self.hellos:
            hellos, self.hellos = self.hellos, ()
            header, _ = from_records(super().__call__(kind, content))
            return spoilt(header, {}, hellos[0])
        if not isinstance(order, TrainOrder) or order.run_is_over or not self.spoils:
            return super().__call__(kind, content)
        reply, update = self._train(order)
        header: Any = to_header(reply) | {"node_name": self.name}
        arrays = {part.name: (part.dtype, part.shape, bytes(part.data)) for part in encode(update)}
        return spoilt(header, arrays, self.spoils.pop())


def spoilt(header: Any, arrays: dict[str, Any], spoil: Spoil) -> Any:
    what, where, value = spoil
    if what == "raise":
        raise RuntimeError(value)
    if what in ("set", "drop"):
        header = changed(header, where, value, drop=what == "drop")
    if what in ("shape", "dtype", "name", "data", "values") and arrays:
        first = sorted(arrays)[int(where) % len(arrays)]
        name, (dtype, shape, data) = first, arrays.pop(first)
        match what:
            case "shape":
                shape = tuple(value)
                if math.prod(shape) <= 10_000:
                    data = bytes(4 * math.prod(shape))
            case "dtype":
                dtype = value
            case "name":
                name = value
            case "data":
                data = bytes(value)
            case "values":
                data = torch.full((len(data) // 4,), value).numpy().tobytes()
        arrays[name] = (dtype, shape, data)
    text = header_text(header)
    if what == "cut":
        text = text[: where % len(text)] + value
    record: Any = ArrayRecord({n: Array(d, s, "pilot.raw", b) for n, (d, s, b) in arrays.items()})
    if what == "unreadable":
        return unreadable(record, where, value)
    config: Any = ConfigRecord({"header": text})
    if what == "record":
        records = {"config": config, "parts": record, "header": config}
        records = {k: v for k, v in records.items() if k != value} if where else {value: record}
        return RecordDict(records)
    return RecordDict({"config": config, "parts": record})


def changed(header: Any, where: int, value: Any, *, drop: bool) -> Any:
    """`header` with the `where`-th of its values, nested ones among them, replaced or left out."""
    header = copy.deepcopy(header)
    places = list(_places(header))
    table, key = places[where % len(places)]
    if drop:
        del table[key]
    else:
        table[key] = value
    return header


def _places(table: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(table) if isinstance(table, dict) else range(len(table)):
        yield table, key
        if isinstance(table[key], dict | list):
            yield from _places(table[key])


def unreadable(record: ArrayRecord, where: int, byte: int) -> Any:
    """What Flower raises where it makes a record of bytes of which one is another, if it does not take it."""
    raw = bytearray(record.deflate())
    raw[where % len(raw)] = byte
    try:
        taken: Any = ArrayRecord.inflate(bytes(raw), record.children)
    except Exception as error:  # noqa: BLE001 - that is the question
        return error
    return RecordDict({"config": ConfigRecord({"header": "{}"}), "parts": taken})


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory, if there is one: what is asked here is not whether files survive."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and shutil.disk_usage(shared).free > 50e6
    with tempfile.TemporaryDirectory(dir=shared if in_memory else None) as directory:
        yield Path(directory)


@settings(
    max_examples=max(5, REPLIES // A_RUN),
    deadline=None,
    derandomize=not REPLIES,
    database=None,
    phases=[Phase.generate],  # a run that hangs would be shrunk for hours
    suppress_health_check=list(HealthCheck),
)
@given(all_spoils=st.lists(spoils, min_size=A_RUN, max_size=A_RUN))
def test_run_survives_whatever_its_clients_say_and_its_books_are_right(
    redis_url: str, memory: Path, all_spoils: list[Spoil]
) -> None:
    run_dir = Path(tempfile.mkdtemp(dir=memory))
    bad = [SpoiltSite(f"bad-{i}") for i in range(SITES)]
    for i, site in enumerate(bad):
        site.spoils = list(all_spoils[i::SITES])
    bad[0].hellos = all_spoils[:1]
    config = scripted_config(
        run_name=run_dir.name,
        num_rounds=ROUNDS,
        epochs=ROUNDS * (SITES + 1),
        cooling_time=0.0,
        quarantine=True,
        round_max_duration=1e6,
        grace_max=1e5,
        clients_timeout=600.0,
    )
    run = Server(config, [ScriptedSite("good"), *bad], run_dir, redis_url)
    state = run.run(FastClock(speed=100))
    assert len(state.history) == ROUNDS
    check_books(run, state)
    shutil.rmtree(run_dir)


def check_books(run: Server, state: RunState) -> None:
    ledger = state.ledger
    assert not ledger.open
    assert ledger.rows_leased == ledger.rows_committed + ledger.rows_returned
    merged = [json.loads(line) for line in state.merged_log]
    committed = [(*key, intervals) for key, intervals in ledger.committed().items()]
    check_rows(merged, committed, tokens=state.tokens, row_tokens=ROW_TOKENS)
    assert [one["round"] for one in merged if one["client"] == "good"] == [1, 2, 3, 4]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.weights.values())
    for record in state.history:
        assert record.train_loss is not None and record.train_loss < 1e9
    lines = (run.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) < MAX_EVENT_BYTES and all(json.loads(line) for line in lines)
    snapshot = latest_snapshot(run.run_dir / "snapshots", report=pytest.fail)
    assert snapshot is not None and snapshot.round_number == ROUNDS
