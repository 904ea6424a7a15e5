"""The learning curves of tiny federations, pinned: nobody changes what a federation learns unseen."""

import json

import pytest

from .federation_curves import CASES, GOLDEN, curve

# Relative. Measured: a thousandth of the learning rate moves a curve by 9e-4.
TOLERANCE = 2e-5


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_the_pinned_one(name: str) -> None:
    pinned = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert pinned[-1] < pinned[0] - 1, "it did not learn"
    assert curve(CASES[name]) == pytest.approx(pinned, rel=TOLERANCE)


def test_a_thousandth_of_the_outer_rate_shows() -> None:
    pinned = json.loads(GOLDEN.read_text(encoding="utf-8"))["one client"]
    other = curve(CASES["one client"], **{"outer-lr": 1.001})
    assert other != pytest.approx(pinned, rel=TOLERANCE)


def test_auto_gives_two_clients_their_length_back() -> None:
    pinned = json.loads(GOLDEN.read_text(encoding="utf-8"))["two clients"]
    as_it_is = curve(CASES["two clients"], **{"outer-lr": 1.0})
    assert as_it_is != pytest.approx(pinned, rel=1e-3)
