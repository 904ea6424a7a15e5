"""How far optimizer steps can move a model at most: never less than they do, on whatever gradient."""

from typing import Any

import pytest
import torch

from pilot import plan
from pilot.config import RunConfig

CPU = torch.device("cpu")


def config(**values: Any) -> RunConfig:
    defaults = {"run-name": "r", "depth": 1, "vocab-size": 300, "sequence-len": 8}
    return RunConfig.from_mapping(defaults | {"total-batch-size": 512, "lr": 0.1} | values)


def moved(run: RunConfig, steps: int, gradient: Any, share: float = 1.0) -> tuple[float, float]:
    """(how far `steps` steps of `share` of a batch have moved the first weights, how far they can)."""
    weights = plan.initial_weights(run)
    model = plan.build_model(run, device=CPU, compute_dtype=torch.float32)
    model.load_state_dict(weights)
    optimizer = plan.make_optimizer(run, model)
    betas = [group.get("betas") for group in optimizer.param_groups]
    plan.take_share(optimizer, betas, share)
    for step in range(steps):
        for param in model.parameters():
            param.grad = gradient(param, step)
        optimizer.step()
    now = model.state_dict()
    square = sum(float((now[n] - weights[n]).double().square().sum()) for n in weights)
    return square**0.5, plan.Movement.of(run).limit(weights, steps=steps, share=share)


def noise(param: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(step))


def steady(param: torch.Tensor, step: int) -> torch.Tensor:
    return torch.ones_like(param) / 7


def burst(param: torch.Tensor, step: int) -> torch.Tensor:
    """A quiet beginning and then more and more: where AdamW's second moment lags behind the first."""
    return torch.full_like(param, 1e-6 * 8.0**step)


@pytest.mark.parametrize("gradient", [noise, steady, burst])
@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_no_gradient_moves_a_model_further_than_the_limit(
    gradient: Any, arch: str, decay: float
) -> None:
    for steps in (1, 6):
        far, limit = moved(config(**{"arch": arch, "weight-decay": decay}), steps, gradient)
        assert 0.05 * limit < far <= limit


def test_a_client_with_a_small_share_of_the_batch_may_move_further_and_no_more_than_its_limit() -> (
    None
):
    rare, whole = [moved(config(), 6, burst, share) for share in (0.1, 1.0)]
    assert whole[0] < rare[0] <= rare[1]
    assert whole[1] < rare[1]


def test_second_moments_remember_as_many_tokens_whatever_the_share() -> None:
    optimizer = plan.make_optimizer(
        config(), plan.build_model(config(), device=CPU, compute_dtype=torch.float32)
    )
    betas = [group.get("betas") for group in optimizer.param_groups]
    for share in (0.25, 0.01, 1.0):  # each from the whole batch, not from the share before
        plan.take_share(optimizer, betas, share)
        found = [group["betas"] for group in optimizer.param_groups if group["kind"] == "adamw"]
        assert found == [(0.8, pytest.approx(1 - 0.05 * share))] * 2
    assert [group.get("betas") for group in optimizer.param_groups] == betas


def test_every_weight_has_its_limit() -> None:
    for arch in ("classic", "modern"):
        run = config(arch=arch)
        assert {rate.name for rate in plan.Movement.of(run).rates} == set(plan.initial_weights(run))


def test_limit_grows_with_steps_and_learning_rates() -> None:
    weights = plan.initial_weights(config())
    one = plan.Movement.of(config()).limit(weights, steps=1)
    assert plan.Movement.of(config()).limit(weights, steps=10) >= 10 * one
    twice = plan.Movement.of(config(lr=0.2, **{"weight-decay": 0.0}))
    once = plan.Movement.of(config(**{"weight-decay": 0.0}))
    assert twice.limit(weights, steps=1) == pytest.approx(2 * once.limit(weights, steps=1))
