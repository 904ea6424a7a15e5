"""What becomes of a round's pseudo-gradients, against plain float64."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pilot.rules import aggregation as module
from pilot.rules.aggregation import Merged, Spilled, votes_of, weighted_mean

from .aggregation_kit import aggregate, gathered

SHAPES = {"a": (4, 3), "b": (5,), "scalar": ()}


def update(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


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


# -- from disk, robust or not ------------------------------------------------------------------------


def spill(directory: Path, updates: list[tuple[str, int, dict[str, Tensor]]]) -> list[Spilled]:
    spilled = []
    for number, (client, tokens, tensors) in enumerate(updates):
        path = directory / f"{number}.safetensors"
        save_file(tensors, path)
        spilled.append(Spilled(client, tokens, path))
    return spilled


def some(clients: int, *, seed: int = 0) -> list[tuple[str, int, dict[str, Tensor]]]:
    chance = random.Random(seed)
    return [
        (f"c{i}", chance.randrange(1, 10_000), update(100 * seed + i, scale=10.0 ** (i % 3)))
        for i in range(clients)
    ]


def reference(method: str, updates: Any, name: str, trim_fraction: float) -> Any:
    """In numpy and float64, written without a look at the code."""
    stack = np.stack([tensors[name].double().numpy() for _, _, tensors in updates])
    if method == "median":
        return np.median(stack, axis=0)
    cut = max(1, math.floor(trim_fraction * len(updates)))
    return np.sort(stack, axis=0)[cut : len(updates) - cut].mean(axis=0)


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
@pytest.mark.parametrize(("clients", "trim_fraction"), [(3, 0.2), (4, 0.2), (7, 0.3), (11, 0.2)])
def test_robust_aggregates_are_those_of_numpy_in_float64(
    tmp_path: Path, method: str, clients: int, trim_fraction: float
) -> None:
    updates = some(clients, seed=clients)
    found = aggregate(spill(tmp_path, updates), method=method, trim_fraction=trim_fraction)
    assert found is not None and found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.shape == SHAPES[name]
        expected = reference(method, updates, name, trim_fraction)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_mean_from_disk_is_the_weighted_mean_of_numpy(tmp_path: Path) -> None:
    updates = some(5)
    found = aggregate(spill(tmp_path, updates), method="mean")
    assert found is not None
    tokens = [count for _, count, _ in updates]
    for name, tensor in found.items():
        stack = np.stack([tensors[name].double().numpy() for _, _, tensors in updates])
        expected = np.average(stack, axis=0, weights=tokens)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
def test_one_outlier_of_three_moves_a_robust_aggregate_no_further_than_the_others_lie(
    tmp_path: Path, method: str
) -> None:
    updates = some(3)
    updates[1] = ("liar", 10**9, {k: 1e30 * torch.ones_like(v) for k, v in update(1).items()})
    found = aggregate(spill(tmp_path, updates), method=method, trim_fraction=0.2)
    assert found is not None
    for name, tensor in found.items():
        honest = torch.stack([updates[0][2][name], updates[2][2][name]])
        assert bool((tensor <= honest.max(dim=0).values).all())
        assert bool((tensor >= honest.min(dim=0).values).all())


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
def test_tokens_of_a_client_give_it_no_more_votes(tmp_path: Path, method: str) -> None:
    updates = some(5)
    shouting = [(client, 10**9 if i == 2 else 1, t) for i, (client, _, t) in enumerate(updates)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = aggregate(spill(tmp_path / "a", updates), method=method, trim_fraction=0.2)
    other = aggregate(spill(tmp_path / "b", shouting), method=method, trim_fraction=0.2)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_two_replies_of_one_client_are_one_vote_weighted_by_their_tokens(tmp_path: Path) -> None:
    updates = some(3)
    first, second = update(50), update(51)
    both = [*updates[:2], ("c2", 3, first), ("c2", 1, second)]
    folded = {name: (3 * first[name] + second[name]) / 4 for name in SHAPES}
    found = aggregate(spill(tmp_path, both), method="median")
    assert found is not None
    expected = [*updates[:2], ("c2", 4, folded)]
    for name, tensor in found.items():
        wanted = reference("median", expected, name, 0)
        np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["median", "trimmed-mean"])
@pytest.mark.parametrize("clients", [1, 2])
def test_fewer_than_three_clients_have_their_weighted_mean(
    tmp_path: Path, method: str, clients: int
) -> None:
    spilled = spill(tmp_path, [*some(clients), ("c0", 77, update(9))])
    robust = aggregate(spilled, method=method, trim_fraction=0.2)
    torch.testing.assert_close(robust, aggregate(spilled, method="mean"), rtol=0, atol=0)


def test_trimming_nothing_is_the_plain_mean_of_the_votes(tmp_path: Path) -> None:
    updates = some(4)
    found = aggregate(spill(tmp_path, updates), method="trimmed-mean", trim_fraction=0.0)
    assert found is not None
    mean = torch.stack([tensors["a"] for _, _, tensors in updates]).double().mean(dim=0)
    torch.testing.assert_close(found["a"].double(), mean, rtol=1e-5, atol=1e-6)


def test_order_of_the_votes_makes_no_difference(tmp_path: Path) -> None:
    spilled = spill(tmp_path, some(5))
    one = aggregate(spilled, method="median")
    torch.testing.assert_close(one, aggregate(spilled[::-1], method="median"), rtol=0, atol=0)


def test_tensor_is_sorted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = spill(tmp_path, some(5))
    whole = aggregate(spilled, method="trimmed-mean", trim_fraction=0.2)
    monkeypatch.setattr(module, "_CHUNK", 4)
    pieces = aggregate(spilled, method="trimmed-mean", trim_fraction=0.2)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=0)


LARGE = {"wide": (5, 70_000), "long": (900, 2, 150), "vector": (9,)}


@pytest.mark.parametrize("method", ["mean", "median", "trimmed-mean"])
@pytest.mark.parametrize("restore_lengths", [False, True])
def test_a_few_rows_at_a_time_give_the_bits_of_all_at_once(
    tmp_path: Path, method: str, restore_lengths: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    updates = [
        {name: torch.randn(shape, generator=generator) for name, shape in LARGE.items()}
        for _ in range(4)
    ]
    replies = spill(tmp_path, [(f"c{i % 3}", 10 + i, one) for i, one in enumerate(updates)])
    merged = Merged(replies, method=method, restore_lengths=restore_lengths)
    pieces = gathered(merged, values=1 << 16)
    torch.testing.assert_close(pieces, gathered(merged, values=1 << 30), rtol=0, atol=0)
    if method == "mean":
        weighted = ((10.0 + i, one) for i, one in enumerate(updates))
        whole = weighted_mean(weighted, restore_lengths=restore_lengths)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=0)


def test_replies_of_other_tensors_have_no_aggregate(tmp_path: Path) -> None:
    replies = spill(tmp_path, [("a", 1, update(1)), ("b", 1, {"a": update(2)["a"]})])
    with pytest.raises(ValueError, match="different tensors"):
        Merged(replies, method="mean")


def test_votes_are_all_dot_products_with_one_vote_a_client(tmp_path: Path) -> None:
    replies = []
    for number, (client, tokens) in enumerate((("a", 8), ("b", 16), ("a", 24))):
        save_file(update(number), tmp_path / f"{number}")
        replies.append(Spilled(client, tokens, tmp_path / f"{number}", steps=tokens / 8))
    momentum = update(9)
    outer = {f"momentum.{name}": tensor for name, tensor in momentum.items()}
    votes = votes_of(replies, momentum=outer | {"step": torch.ones(())})

    def flat(one: dict[str, Tensor]) -> Tensor:
        return torch.cat([one[name].reshape(-1) for name in sorted(SHAPES)]).double()

    both = {name: (8 * update(0)[name] + 24 * update(2)[name]) / 32 for name in SHAPES}
    a, b, m = flat(both), flat(update(1)), flat(momentum)
    assert votes.clients == ["a", "b"] and votes.steps == [2.0, 2.0]
    expected = [[float(x @ y) for y in (a, b)] for x in (a, b)]
    assert np.allclose(votes.gram, expected, rtol=1e-6)
    cosines = [float(x @ m / (x.norm() * m.norm())) for x in (a, b)]
    assert votes.heading is not None and np.allclose(votes.heading, cosines, rtol=1e-6)
    none = votes_of([], momentum={})
    assert (none.clients, none.gram, none.heading) == ([], [], None)
