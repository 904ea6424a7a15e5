"""What the doctor says of what its probes find: a table a subject."""

from typing import Any

import pytest

from pilot.doctor import checks
from pilot.doctor.facts import (
    ClockFacts,
    DataFacts,
    FlowerFacts,
    PortFacts,
    RedisFacts,
    SizeFacts,
    SpaceFacts,
    TorchFacts,
)
from pilot.doctor.finding import Finding, Level

OK, FIX, UNKNOWN = Level.OK, Level.FIX, Level.UNKNOWN


def levels(found: list[Finding]) -> dict[str, Level]:
    assert all(bool(one.cure) == (one.level is FIX) for one in found), "a cure where one is needed"
    return {one.what: one.level for one in found}


@pytest.mark.parametrize(
    ("version", "level"),
    [((3, 11, 7), OK), ((3, 12, 0), OK), ((3, 10, 9), FIX), ((3, 13, 0), FIX)],
)
def test_python(version: tuple[int, ...], level: Level) -> None:
    assert levels(checks.check_python(version)) == {"Python": level}


CUDA = {"version": "2.9", "cuda": "13.0", "driver": "580.65"}


@pytest.mark.parametrize(
    ("facts", "expected", "words"),
    [
        (TorchFacts(error="cannot be used: x"), {"torch": FIX}, "uv sync"),
        (TorchFacts(version="2.9+cpu"), {"torch": OK, "devices": OK}, "no GPU here"),
        (TorchFacts(version="2.9", mps=True), {"torch": OK, "devices": OK}, "MPS"),
        (
            TorchFacts(**CUDA, gpus_here=1, devices=("H100",)),
            {"torch": OK, "devices": OK},
            "1 × H100",
        ),
        (
            TorchFacts(**CUDA, gpus_here=2, devices=("H100", "H100"), nccl="2.27"),
            {"torch": OK, "devices": OK, "NCCL": OK},
            "2.27",
        ),
        (
            TorchFacts(**CUDA, gpus_here=2, devices=("H100", "H100")),
            {"torch": OK, "devices": OK, "NCCL": FIX},
            "torch has none",
        ),
        (
            TorchFacts(**CUDA, gpus_here=2, devices=("H100", "L4"), nccl="2.27"),
            {"torch": OK, "devices": FIX, "NCCL": OK},
            "a node for each kind",
        ),
        (
            TorchFacts(**CUDA | {"driver": "550.1"}, gpus_here=8),
            {"torch": OK, "devices": FIX},
            "needs driver 580 or newer, and here is 550.1",
        ),
        (
            TorchFacts(version="2.9+cpu", gpus_here=8),
            {"torch": OK, "devices": FIX},
            "built for CUDA",
        ),
        (TorchFacts(**CUDA, gpus_here=8), {"torch": OK, "devices": FIX}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_torch_driver_devices_and_nccl(facts: TorchFacts, expected: Any, words: str) -> None:
    found = checks.check_torch(facts)
    assert levels(found) == expected
    assert words in " ".join(one.line() for one in found)


GOOD = RedisFacts("redis://h", version="8.0", maxmemory=0, policy="noeviction", saves=False)


@pytest.mark.parametrize(
    ("changes", "what", "level"),
    [
        ({}, "Redis", OK),
        ({"error": "cannot reach Redis"}, "Redis", FIX),
        ({"loopback": False, "password": False}, "Redis password", FIX),
        ({"loopback": True, "password": False}, "Redis memory", OK),
        ({"loopback": False, "tls": False}, "Redis TLS", UNKNOWN),
        ({"maxmemory": 10**6, "policy": "allkeys-lru"}, "Redis memory", FIX),
        ({"maxmemory": 10**6, "policy": "volatile-lru"}, "Redis memory", OK),
        ({"maxmemory": 0, "policy": "allkeys-lru"}, "Redis memory", OK),
        ({"maxmemory": None, "policy": None}, "Redis memory", UNKNOWN),
        ({"saves": True}, "Redis persistence", OK),
        ({"last_save_ok": False}, "Redis persistence", FIX),
        ({"writes": "OOM"}, "Redis writes", FIX),
    ],
)
def test_redis(changes: dict[str, Any], what: str, level: Level) -> None:
    found = levels(checks.check_redis(RedisFacts(**vars(GOOD) | changes)))
    assert found[what] is level
    if not changes:
        assert set(found.values()) == {OK}
    if changes.get("password") is False and changes.get("loopback"):
        assert "Redis password" not in found


@pytest.mark.parametrize(
    ("ahead_s", "good_to_s", "level"),
    [
        (0.2, 0.0, OK),
        (-1.5, 0.0, OK),
        (3.0, 0.0, FIX),
        (3.0, 1.5, OK),
        (5.5, 0.0, FIX),
        (-4.0, 0.0, FIX),
        (-400.0, 0.0, FIX),
        (None, 0.0, UNKNOWN),
    ],
)
def test_clock(ahead_s: float | None, good_to_s: float, level: Level) -> None:
    (found,) = checks.check_clock(ClockFacts(ahead_s, good_to_s, "that of Redis"))
    assert levels([found]) == {"clock": level}
    if ahead_s == 5.5:
        assert (
            "5.5 s ahead of that of Redis: Flower refuses a node that is more than 5 s"
            in found.text
        )


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (FlowerFacts("1.41", "<1.43", True, "local", local=True), [OK, OK]),
        (FlowerFacts("1.41", "<1.43", True, "fleet", "h:8000"), [OK, OK]),
        (FlowerFacts("1.50", "<1.43", False, "fleet", "h:8000"), [FIX, OK]),
        (FlowerFacts("1.41", "<1.43", True, refused="no SuperLink answers"), [OK, FIX]),
    ],
)
def test_flower(facts: FlowerFacts, expected: list[Level]) -> None:
    assert list(levels(checks.check_flower(facts)).values()) == expected


def test_ports_that_are_taken_are_named_and_no_fault() -> None:
    (found,) = checks.check_ports(
        [PortFacts(8000, "SuperLink", False), PortFacts(6379, "Redis", True)]
    )
    assert found.level is OK and found.text == "something listens on 8000 (SuperLink)"


NEEDS = {
    "server_disk": 20 * 10**9,
    "server_memory": 8 * 10**9,
    "site_disk": 5 * 10**9,
    "rows_disk": 10 * 10**9,
    "site_memory": 4 * 10**9,
    "shm": 10**9,
}
SPACE = SpaceFacts("/data", disk_free=16 * 10**9, memory=6 * 10**9, shm=64 * 10**6)


def test_disk_and_memory_are_what_the_role_needs() -> None:
    found = levels(checks.check_space(SPACE, SizeFacts(values=NEEDS), ("server", "site")))
    assert found == {
        "disk as a server": FIX,
        "memory as a server": FIX,
        "disk as a site": OK,
        "memory as a site": OK,
        "shared memory": FIX,
    }
    assert levels(checks.check_space(SPACE, None, ())) == {"disk": OK}
    assert levels(checks.check_space(SpaceFacts("/", 10**9), None, ())) == {"disk": FIX}
    assert levels(checks.check_space(SPACE, SizeFacts("x"), ("site",))) == {"sizes": UNKNOWN}


OURS = {"tokenizer": "t", "corpus": "c", "pilot package": "p", "packing": "k"}


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ({}, {"data": OK, "fingerprints": UNKNOWN}),
        (OURS | {"validation rows": "v"}, {"data": OK, "fingerprints": OK}),
        (OURS | {"tokenizer": "other"}, {"data": OK, "fingerprint of tokenizer": FIX}),
        (
            {"corpus": "x", "pilot package": "y"},
            {"data": OK, "fingerprint of corpus": FIX, "fingerprint of pilot package": FIX},
        ),
    ],
)
def test_data_and_fingerprints(heads: dict[str, str], expected: dict[str, Level]) -> None:
    facts = DataFacts(source="fineweb-edu", shards=3, wanted_shards=240, fingerprints=OURS)
    assert levels(checks.check_data(facts, heads, "d20")) == expected
    assert levels(checks.check_data(DataFacts(error="no tokenizer"), heads)) == {"data": FIX}


def test_a_directory_that_cannot_be_written_is_named() -> None:
    found = checks.check_writable({"/a": "", "/b": "Permission denied"})
    assert [one.line().split(": ")[1:3] for one in found] == [["/b", "Permission denied"]]
    assert levels(found) == {"write permissions": FIX}
    assert levels(checks.check_writable({"/a": ""})) == {"write permissions": OK}
