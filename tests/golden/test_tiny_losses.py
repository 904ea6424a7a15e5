"""The first 20 losses of a tiny model, pinned: a change of the numbers has to be meant."""

import json

import pytest

from .tiny_losses import GOLDEN, STEPS, losses

ARCHITECTURES = ("classic", "modern")
# Relative. Measured: summing in another order (two threads, other micro-batches) moves a loss by 1e-7 of
# itself; 1 % of the learning rate moves one by 7e-3, 1 % of the momentum by 2e-4 (classic), 3.5e-5 (modern).
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=ARCHITECTURES)
def golden(request: pytest.FixtureRequest) -> tuple[str, list[float]]:
    return request.param, json.loads(GOLDEN.read_text(encoding="utf-8"))[request.param]


def test_the_losses_are_the_pinned_ones(golden: tuple[str, list[float]]) -> None:
    arch, pinned = golden
    assert len(pinned) == STEPS and pinned[-1] < pinned[0] - 1, "it did not learn"
    assert losses(arch) == pytest.approx(pinned, rel=TOLERANCE)


@pytest.mark.parametrize("changed", ["lr_factor", "momentum_factor"])
def test_one_percent_of_learning_rate_or_momentum_shows(
    golden: tuple[str, list[float]], changed: str
) -> None:
    arch, pinned = golden
    assert losses(arch, **{changed: 1.01}) != pytest.approx(pinned, rel=TOLERANCE)
