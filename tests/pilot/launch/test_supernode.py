"""How long a SuperNode of `pilot node` sleeps: briefly after a message, as Flower's own if nothing happens."""

import inspect
import re

import pytest
from flwr.supernode import start_client_internal

from pilot.launch import supernode


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Sleeps on a clock that only they move; `slept.append` lets other time pass."""
    passed: list[float] = []
    monkeypatch.setattr(supernode.time, "monotonic", lambda: 100.0 + sum(passed))
    monkeypatch.setattr(supernode.time, "sleep", passed.append)
    return passed


def test_it_is_eager_for_a_while_after_a_message_and_patient_afterwards(
    slept: list[float],
) -> None:
    pace = supernode.Pace()
    for _ in range(45):
        pace.sleep(3)
    assert slept == [0.5] * 40 + [3] * 5
    pace.sleep(0.5)  # waiting for the reply to a message
    assert slept[-1] == 0.2
    slept.append(7.0)
    pace.sleep(3)
    assert slept[-1] == 0.5
    for _ in range(60):
        pace.sleep(3)
    assert slept[-15:] == [3] * 15


def test_flowers_loop_sleeps_as_it_is_expected_to() -> None:
    source = inspect.getsource(start_client_internal)
    assert set(re.findall(r"\btime\.\w+\([^)]*\)", source)) == {"time.sleep(3)", "time.sleep(0.5)"}
