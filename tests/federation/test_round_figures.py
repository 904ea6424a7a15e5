"""What each round says of its updates and of its outer step: the figures that show a federation going wrong."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pilot.wire.messages import TrainOrder, TrainReply

from .scripted import ScriptedSite, events, fresh_state, scripted_config

LOST = {"a": 0.1, "b": 0.5}


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([update[name].reshape(-1) for name in ("w", "b")]).double()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


@pytest.mark.parametrize("optimizer", ["fedavg", "nesterov"])
def test_figures_of_a_round_are_those_of_its_updates_and_its_step(
    server: Any, optimizer: str
) -> None:
    sent: dict[tuple[int, str], Tensor] = {}

    def note(order: TrainOrder, reply: TrainReply, update: dict[str, Tensor]) -> TrainReply:
        if update:
            sent[order.fence.round_number, order.client] = flat(update)
        return replace(reply, code_lost=LOST[order.client])

    sites = [ScriptedSite("a", react=note), ScriptedSite("b", rows=2, react=note)]
    values = {"outer_optimizer": optimizer, "outer_lr": 0.5, "outer_momentum": 0.5}
    run = server(sites, num_rounds=3, **values)
    state = run.run()
    found = [event for event in events(run, "metrics") if "outer_norm" in event]
    assert [event["step"] for event in found] == [1, 2, 3]

    means = [(4 * sent[n, "a"] + 2 * sent[n, "b"]) / 6 for n in (1, 2, 3)]
    momentum, steps = torch.zeros(11, dtype=torch.float64), []
    for mean in means:
        momentum = 0.5 * momentum + mean
        steps.append(0.5 * (mean + 0.5 * momentum if optimizer == "nesterov" else mean))
    weights = flat(fresh_state(scripted_config()).weights) - sum(steps)
    torch.testing.assert_close(flat(state.weights), weights, rtol=1e-5, atol=1e-5)

    for event, step, mean in zip(found, steps, means, strict=True):
        assert event["outer_norm"] == pytest.approx(float(step.norm()), rel=1e-5)
        assert event["update_norm"] == pytest.approx(float(mean.norm()), rel=1e-5)
        both = [sent[event["step"], client] for client in "ab"]
        assert event["client_cosine"] == pytest.approx(cosine(*both), abs=1e-5)
        assert event["code_lost"] == pytest.approx((4 * 0.1 + 2 * 0.5) / 6)
    assert found[0]["outer_cosine"] is None
    for number in (1, 2):
        expected = cosine(steps[number], steps[number - 1])
        assert found[number]["outer_cosine"] == pytest.approx(expected, abs=0.01)  # kept in bf16
    lost = {event["client"]: event["code_lost"] for event in events(run, "reply")}
    assert lost == LOST and not any(math.isnan(value) for value in lost.values())
