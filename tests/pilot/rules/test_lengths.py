"""The mean of updates is as long as the updates: what noise takes from it is given back, and no more."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from pilot.rules import lengths as module
from pilot.rules.aggregation import Spilled, weighted_mean
from pilot.rules.lengths import squares

from .aggregation_kit import aggregate

SHAPES = {"a": (6, 40), "stack": (2, 3, 40), "b": (50,), "scalar": (), "empty": (0,)}


def update(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def restored(updates: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    found = weighted_mean(updates, restore_lengths=True)
    assert found is not None
    return found


def test_one_clients_update_and_those_that_agree_stay_as_they_are() -> None:
    one = update(0)
    alone = restored([(5.0, one)])
    torch.testing.assert_close(alone, weighted_mean([(5.0, one)]), rtol=0, atol=0)
    torch.testing.assert_close(restored([(5.0, one), (2.0, one)]), one)


def test_rows_of_independent_updates_have_their_own_length_again() -> None:
    updates = [(1.0, update(seed)) for seed in range(4)]
    mean = weighted_mean(updates)
    assert mean is not None
    for name, tensor in restored(updates).items():
        usual = sum(squares(one[name]) for _, one in updates) / 4
        factor = (usual / squares(mean[name])).sqrt().clamp(1.0, 2.0).float()
        torch.testing.assert_close(tensor, mean[name] * factor)
        assert tensor.dtype == torch.float32
    row = restored(updates)["b"]
    assert float(row.norm()) == pytest.approx(math.sqrt(50), rel=0.2)


def test_a_row_that_one_client_alone_has_moved_is_not_shortened_to_a_quarter() -> None:
    moved, still = (
        {"w": torch.tensor([[3.0, 4.0], [1.0, 0.0]])},
        {"w": torch.tensor([[0.0, 0.0], [1.0, 0.0]])},
    )
    found = restored([(1.0, moved), *[(1.0, still)] * 3])["w"]
    torch.testing.assert_close(found, torch.tensor([[1.5, 2.0], [1.0, 0.0]]))


def test_updates_that_oppose_each_other_gain_no_more_than_noise_would() -> None:
    one = {"w": torch.tensor([[1.0, 0.001]])}
    other = {"w": torch.tensor([[-1.0, 0.001]])}
    found = restored([(1.0, one), (1.0, other)])["w"]
    torch.testing.assert_close(found, math.sqrt(2) * torch.tensor([[0.0, 0.001]]))
    nothing = restored([(1.0, one), (1.0, {"w": -one["w"]})])["w"]
    assert torch.equal(nothing, torch.zeros(1, 2))


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5), st.integers(0, 100))
def test_the_gain_is_at_most_the_root_of_the_effective_number_of_clients(
    weights: list[float], seed: int
) -> None:
    updates = [
        (w, {"w": torch.nn.functional.normalize(update(seed + i)["a"])})
        for i, w in enumerate(weights)
    ]
    mean = weighted_mean(updates)
    assert mean is not None
    gains = (squares(restored(updates)["w"]) / squares(mean["w"])).sqrt()
    most = sum(weights) / math.sqrt(sum(w * w for w in weights))
    assert float(gains.min()) >= 1 - 1e-6 and float(gains.max()) <= most * (1 + 1e-5)


def test_squares_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = update(1)["stack"]
    whole = squares(tensor)
    assert whole.shape == (2, 3, 1)
    torch.testing.assert_close(whole[..., 0], tensor.double().norm(dim=-1) ** 2)
    monkeypatch.setattr(module, "_PIECE", 80)
    torch.testing.assert_close(squares(tensor), whole, rtol=0, atol=0)
    assert squares(torch.zeros(0)).tolist() == [0.0]


@pytest.mark.parametrize("method", ["mean", "trimmed-mean", "median"])
def test_replies_are_merged_to_their_own_length_whatever_the_method(
    tmp_path: Path, method: str
) -> None:
    replies = []
    for seed in range(5):
        path = tmp_path / f"{seed}.safetensors"
        save_file({"w": torch.nn.functional.normalize(update(seed)["a"])}, path)
        replies.append(Spilled(f"client-{seed}", 10, path))
    plain = aggregate(replies, method=method, trim_fraction=0.2)
    found = aggregate(replies, method=method, trim_fraction=0.2, restore_lengths=True)
    assert plain is not None and found is not None
    assert float(squares(plain["w"]).max()) < 0.7
    torch.testing.assert_close(squares(found["w"]), torch.ones(6, 1).double(), rtol=0.2, atol=0)
    cosine = torch.nn.functional.cosine_similarity(plain["w"], found["w"])
    torch.testing.assert_close(cosine, torch.ones(6))


def test_an_outlier_does_not_lengthen_a_median(tmp_path: Path) -> None:
    replies = []
    for seed in range(5):
        path = tmp_path / f"{seed}.safetensors"
        row = torch.nn.functional.normalize(update(seed)["a"])
        save_file({"w": row * (1e6 if seed == 0 else 1.0)}, path)
        replies.append(Spilled(f"client-{seed}", 10, path))
    found = aggregate(replies, method="median", restore_lengths=True)
    assert found is not None and float(squares(found["w"]).max()) < 1.1
