"""Outer steps that lead where a test wants."""

from collections.abc import Mapping

from torch import Tensor

from pilot.rules.outer import RESIDUAL, Coded
from pilot.run.state import OuterStep, RunState


def leads_to(
    state: RunState, wanted: Mapping[str, Tensor], outer: Mapping[str, Tensor] | None = None
) -> OuterStep:
    """From the weights of `state` to `wanted`, with an outer state of which tests read nothing else."""

    def step(coded: Coded | None) -> Mapping[str, Tensor]:
        new = dict(outer or {})
        for name, weight in state.weights.items():
            before = weight.clone()
            weight.copy_(wanted[name])
            if coded is not None:
                left = coded.say(name, before, weight)
                new |= {RESIDUAL + name: left} if coded.leaves_residual(weight.shape) else {}
        return new

    return step
