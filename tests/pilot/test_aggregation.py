"""What may enter the mean, and the mean."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pilot.aggregation import refusal, weighted_mean

SHAPES = {"a": (4, 3), "b": (5,), "scalar": ()}


def update(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


WEIGHTS = update(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_finite_update_of_the_right_shapes_is_taken(dtype: torch.dtype) -> None:
    good = {name: tensor.to(dtype) for name, tensor in update(1).items()}
    assert refusal(good, WEIGHTS, tokens=1) is None
    assert refusal({k: torch.zeros_like(v) for k, v in good.items()}, WEIGHTS, tokens=1) is None


@pytest.mark.parametrize("tokens", [0, -5])
def test_update_without_tokens_is_refused(tokens: int) -> None:
    assert str(tokens) in (refusal(update(1), WEIGHTS, tokens=tokens) or "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_update_that_is_not_finite_is_refused(name: str, value: float) -> None:
    bad = update(1)
    bad[name].view(-1)[-1] = value
    assert refusal(bad, WEIGHTS, tokens=1) == f"{name} is not finite"


def test_infinities_that_cancel_are_refused() -> None:
    bad = update(1)
    bad["a"][0, 0], bad["a"][0, 1] = math.inf, -math.inf
    assert refusal(bad, WEIGHTS, tokens=1) == "a is not finite"


def test_missing_and_strange_tensors_are_refused_by_name() -> None:
    missing, strange = update(1), update(1) | {"zz": torch.zeros(1)}
    del missing["b"]
    assert "b" in (refusal(missing, WEIGHTS, tokens=1) or "")
    assert "zz" in (refusal(strange, WEIGHTS, tokens=1) or "")


@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), (0,)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    reason = refusal(update(1) | {"a": torch.zeros(shape)}, WEIGHTS, tokens=1)
    assert reason == f"a has shape {shape}, not (4, 3)"


def test_update_of_integers_is_refused() -> None:
    bad = update(1) | {"b": torch.zeros(5, dtype=torch.int32)}
    assert refusal(bad, WEIGHTS, tokens=1) == "b has dtype torch.int32"


def test_mean_is_weighted_as_in_float64() -> None:
    weights = [3.0, 1e6, 2.0**40, 1.0, 777.0]
    updates = [update(seed, scale=10.0**-seed) for seed in range(len(weights))]
    mean = weighted_mean(zip(weights, updates, strict=True))
    assert mean is not None
    for name in SHAPES:
        terms = [w * u[name].double() for w, u in zip(weights, updates, strict=True)]
        expected = sum(terms) / sum(weights)
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-6, atol=1e-12)
        assert mean[name].dtype == torch.float32


def test_replies_are_folded_in_the_order_given() -> None:
    # in fp32 the order shows: 2^24 + 1 - 2^24
    one = [(1.0, {"x": torch.tensor([v])}) for v in (2.0**24, 1.0, -(2.0**24))]
    means = {
        order: weighted_mean([one[i] for i in order]) for order in itertools.permutations((0, 1, 2))
    }
    for order, mean in means.items():
        by_hand = torch.zeros(1)
        for i in order:
            by_hand = by_hand + one[i][1]["x"]
        assert mean is not None and torch.equal(mean["x"], by_hand / 3)
    assert len({float(mean["x"]) for mean in means.values() if mean}) > 1


def test_mean_leaves_the_updates_as_they_are() -> None:
    updates = [update(1), update(2)]
    weighted_mean((2.0, one) for one in updates)
    torch.testing.assert_close(updates, [update(1), update(2)], rtol=0, atol=0)


def test_no_updates_have_no_mean() -> None:
    assert weighted_mean([]) is None


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        weighted_mean([(weight, update(1))])
