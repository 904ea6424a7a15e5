"""Optimizer state that was cut for one number of ranks, cut anew for another: the same numbers."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from nanochat.optim import MuonAdamW

from .data_kit import assert_equal

COUNTS = (1, 2, 3, 5)
# AdamW: rows that no count but 1 divides, fewer rows than ranks, too small to be cut. Muon: 5 and 2 matrices
SHAPES = {"adamw": [(67, 24), (2, 600), (9,)], "muon": [(6, 4)] * 5 + [(4, 8)] * 2}


def _optimizer() -> MuonAdamW:
    generator = torch.Generator().manual_seed(0)

    def params(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    adamw = {"kind": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    muon = {"kind": "muon", "lr": 0.02, "momentum": 0.9, "ns_steps": 5, "beta2": 0.9}
    groups: list[dict[str, Any]] = [{**adamw, "params": params(SHAPES["adamw"])}]
    for shape in sorted(set(SHAPES["muon"])):
        same = [one for one in SHAPES["muon"] if one == shape]
        groups.append({**muon, "weight_decay": 0.0, "params": params(same)})
    return MuonAdamW(groups)


@pytest.fixture(scope="module")
def whole() -> tuple[MuonAdamW, dict[str, Any]]:
    """An optimizer after three steps on one rank, and its state."""
    optimizer = _optimizer()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer, optimizer.state_dict()


@pytest.mark.parametrize("count", COUNTS)
def test_each_rank_gets_its_items_and_nothing_is_changed(
    count: int, whole: tuple[MuonAdamW, dict[str, Any]]
) -> None:
    optimizer, state = whole
    shards = [optimizer.recut([state], rank=rank, world_size=count) for rank in range(count)]
    for group in state["param_groups"]:
        muon = group["kind"] == "muon"
        for number in group["params"][:1] if muon else group["params"]:
            for name, value in state["state"][number].items():
                parts = [shard["state"].get(number, {}).get(name) for shard in shards]
                if name == "step":
                    assert {part for part in parts if part is not None} == {3}
                elif not muon and value.numel() < 1024:
                    assert all(torch.equal(part, value) for part in parts)  # each keeps all of it
                else:
                    chunk = -(-len(value) // count)
                    sizes = [min(chunk, max(0, len(value) - rank * chunk)) for rank in range(count)]
                    assert [part is not None for part in parts] == [size > 0 for size in sizes]
                    cut = [part for part in parts if part is not None]
                    joined = torch.cat(cut)
                    assert torch.equal(joined[: len(value)], value)
                    assert not joined[len(value) :].any()  # Muon's padding
                    assert {len(part) for part in cut} == {chunk} or not muon


@pytest.mark.parametrize(("one", "other"), list(itertools.product(COUNTS, COUNTS)))
def test_from_any_number_of_ranks_to_any_other_and_to_one(
    one: int, other: int, whole: tuple[MuonAdamW, dict[str, Any]]
) -> None:
    optimizer, state = whole
    first = [optimizer.recut([state], rank=rank, world_size=one) for rank in range(one)]
    second = [optimizer.recut(first, rank=rank, world_size=other) for rank in range(other)]
    direct = [optimizer.recut([state], rank=rank, world_size=other) for rank in range(other)]
    assert_equal(second, direct)
    back = _optimizer()
    back.load_state_dict(optimizer.recut(second, rank=0, world_size=1))
    assert_equal(back.state_dict(), state)


def test_a_missing_part_is_not_made_up(whole: tuple[MuonAdamW, dict[str, Any]]) -> None:
    optimizer, state = whole
    shards = [optimizer.recut([state], rank=rank, world_size=3) for rank in range(3)]
    del shards[1]["state"][0]
    with pytest.raises(ValueError, match="rank 1's state is missing"):
        optimizer.recut(shards, rank=0, world_size=1)
    shards[1]["state"][0] = {"step": 3, "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)}
    with pytest.raises(ValueError, match="is not rank 1's of 3"):
        optimizer.recut(shards, rank=0, world_size=1)
