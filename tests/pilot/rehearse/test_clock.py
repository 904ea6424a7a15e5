"""Virtual time: the agenda in its order, leaps only where nothing happens, and actions that end a sleep."""

import pytest

from pilot.rehearse.clock import VirtualClock


def test_actions_happen_at_their_moments_in_the_order_in_which_they_were_planned() -> None:
    clock, seen = VirtualClock(), []
    for due_s, name in ((2.0, "b"), (1.0, "a"), (2.0, "c"), (9.0, "later")):
        clock.at(due_s, lambda name=name: seen.append((name, clock.now_s())))  # type: ignore[misc]
    clock.sleep(3.0)
    assert seen == [("a", 1.0), ("b", 2.0), ("c", 2.0)] and clock.now_s() == 3.0
    clock.at(
        1.0, lambda: seen.append(("past", clock.now_s()))
    )  # of a moment that is over: at the next one
    clock.sleep(0.5)
    assert seen[-1] == ("past", 3.0)


def test_sleep_leaps_as_far_as_nothing_has_happened_and_never_over_an_action() -> None:
    clock = VirtualClock(leap_s=10.0)
    clock.notice(1.0)
    clock.sleep(1.0)
    moments = []
    for _ in range(8):
        clock.sleep(0.5)
        moments.append(clock.now_s() - 1.0)
    assert moments == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 26.0, 36.0]
    clock.notice(clock.now_s() + 3.0)
    clock.sleep(0.5)
    assert clock.now_s() == 40.0
    clock.sleep(0.5)
    assert clock.now_s() == 40.5


def test_an_action_that_raises_ends_the_sleep_at_its_moment_and_the_rest_still_happens() -> None:
    clock, seen = VirtualClock(), []

    def fail() -> None:
        raise KeyError

    clock.at(1.0, fail)
    clock.at(2.0, lambda: seen.append(clock.now_s()))
    with pytest.raises(KeyError):
        clock.sleep(5.0)
    assert (clock.now_s(), seen) == (1.0, [])
    clock.sleep(5.0)
    assert (clock.now_s(), seen) == (6.0, [2.0])
