"""The outer step: what the server does with the mean pseudo-gradient, in fp32.

The pseudo-gradient is global minus local weights, so all three are descents along it. FedAvg: plain
SGD; with a rate of 1 the new model is the mean of the clients'. Nesterov: SGD with Nesterov momentum,
DiLoCo's choice (arXiv 2311.08105). Adam: FedOpt's (arXiv 2003.00295), with bias correction.
Each agrees with the optimizer of that name in torch.optim.

"auto" is a rate of 1 without momentum, of a mean whose rows are as long as the clients' own (`lengths.py`):
what depends on the number of clients is measured in their updates rather than assumed. With one client that is
exactly the training that it would do alone. docs/quality.md says what was compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pilot.config import AUTO, RunConfig
from pilot.tensor_file import TensorFile, TensorWriter, pieces, rows_of

# FedOpt (arXiv 2003.00295, section 5): beta2 0.99; epsilon as in Adam.
ADAM_BETA2 = 0.99
ADAM_EPSILON = 1e-8
RESIDUAL = "residual."  # and a tensor's name: what a `Coded` step could not say

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class OuterRates:
    """`lr` and `momentum` (beta1 of adam) of one outer step."""

    lr: float
    momentum: float

    @staticmethod
    def of(config: RunConfig) -> "OuterRates":
        """What `config` says, with a number for "auto"."""
        lr, momentum = config.outer_lr, config.outer_momentum
        chosen = 0.9 if config.outer_optimizer == "adam" else 0.0
        return OuterRates(
            lr=1.0 if lr == AUTO else lr, momentum=chosen if momentum == AUTO else momentum
        )


def restores_lengths(config: RunConfig) -> bool:
    """Whether the step is meant for a mean as long as the clients' updates: where its rate is "auto"."""
    return config.outer_lr == AUTO


def outer_step(
    config: RunConfig,
    weights: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> tuple[Tensors, Tensors]:
    """New (weights, state) after one step; inputs are unchanged. All tensors fp32, by name.

    `state` is what the last step returned, empty before the first; a snapshot keeps it as it is.
    """
    if weights.keys() != gradient.keys():
        raise ValueError("weights and pseudo-gradient have different names")
    rates = OuterRates.of(config)
    new_weights: Tensors = {}
    new_state: Tensors = {}
    if config.outer_optimizer == "adam":
        new_state["step"] = state.get("step", torch.zeros(())) + 1
    for name, weight in weights.items():
        update = _update(config, rates.momentum, name, gradient[name], state, new_state)
        new_weights[name] = weight - rates.lr * update
    return new_weights, new_state


class LastStep:
    """The outer step before, in bf16: how a run moves shows in its direction beside the next one's.

    It is kept in memory only: after a server's start there is none before the first merge.
    """

    def __init__(self) -> None:
        self._step: Tensors = {}
        self._square = self._last_square = self._along = 0.0

    def forget(self) -> None:
        """The step before is undone."""
        self._step = {}

    def begin(self) -> None:
        """A step is to come, piece by piece."""
        self._square = self._last_square = self._along = 0.0

    def add(self, name: str, first: int, whole: Tensor, moved: Tensor) -> None:
        """The rows of tensor `name` (like `whole`) from `first` on have moved by `moved`, fp32."""
        known = name in self._step
        if not known:
            self._step[name] = torch.zeros_like(whole, dtype=torch.bfloat16)
        rows = moved.shape[0] if whole.dim() > 1 else 1
        last = rows_of(self._step, name, first, first + rows)
        step = moved.reshape(last.shape)
        self._square += _square(step)
        if known:
            before = last.float()
            self._last_square += _square(before)
            self._along += float(torch.dot(step.reshape(-1), before.reshape(-1)))
        last.copy_(step)

    def figures(self) -> dict[str, float | None]:
        """`outer_norm`: the length of the step since `begin`; `outer_cosine`: its cosine with the step before,
        None where there is none."""
        size = math.sqrt(self._square * self._last_square)
        return {
            "outer_norm": math.sqrt(self._square),
            "outer_cosine": self._along / size if size else None,
        }


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


class Gradient(Protocol):
    """A pseudo-gradient whose rows are made when they are asked for."""

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """As `tensor_file.rows_of`."""


class Coded(Protocol):
    """The form in which a step is sent to those who hold the weights, tensor by tensor."""

    def leaves_residual(self, shape: Sequence[int]) -> bool:
        """Whether something of the step of a tensor of `shape` may stay unsaid."""

    def say(self, name: str, before: Tensor, weight: Tensor) -> Tensor:
        """`weight`, which has moved from `before`, moves to where those come who hold `before`.

        Returns what of its way that could not say. Both tensors' memory is used.
        """


def state_shapes(
    config: RunConfig, shapes: Mapping[str, Sequence[int]], coded: Coded | None = None
) -> dict[str, Sequence[int]]:
    """The tensors of the state after a step of a model of `shapes`."""
    found: dict[str, Sequence[int]] = {"step": ()} if config.outer_optimizer == "adam" else {}
    for name, shape in shapes.items():
        if config.outer_optimizer != "fedavg":
            found[f"momentum.{name}"] = shape
        if config.outer_optimizer == "adam":
            found[f"square.{name}"] = shape
        if coded is not None and coded.leaves_residual(shape):
            found[RESIDUAL + name] = shape
    return found


def outer_step_in_place(
    config: RunConfig,
    weights: Mapping[str, Tensor],
    gradient: Gradient,
    state: Mapping[str, Tensor],
    path: Path,
    *,
    coded: Coded | None = None,
    moved: Callable[[str, int, Tensor, Tensor], None] = lambda *_: None,
) -> TensorFile:
    """`outer_step`, to the same bits, of contiguous `weights` in place; the new state goes to `path`.

    `moved` is called for each piece with its tensor, by name, its first row, the whole tensor, and its way.

    It takes a few rows at a time, so it needs no memory to speak of. If the step is `coded`, the weights move
    to where that leads, and the state has what it could not say: a few copies of a tensor. Raises OSError where
    the disk refuses, after which some weights have moved.
    """
    shapes = {name: weight.shape for name, weight in weights.items()}
    new_shapes = state_shapes(config, shapes, coded)
    writer = TensorWriter(path, new_shapes)
    if "step" in new_shapes:
        writer.write("step", state.get("step", torch.zeros(())) + 1)
    for name, weight in weights.items():
        assert weight.is_contiguous(), name  # its rows are views
        kept = [key for key in (f"momentum.{name}", f"square.{name}") if key in new_shapes]
        start = weight.clone() if coded is not None else weight
        for first, end in pieces(weight.shape):
            before = {key: rows_of(state, key, first, end) for key in kept if key in state}
            if "step" in new_shapes:
                before["step"] = state.get("step", torch.zeros(()))
            old = rows_of(weights, name, first, end)
            slope = gradient.rows(name, first, end).reshape(old.shape)
            new, after = outer_step(config, {name: old}, {name: slope}, before)
            moved(name, first, weight, old - new[name])
            old.copy_(new[name])
            for key in kept:
                writer.write(key, after[key], first)
        if coded is not None:
            left = coded.say(name, start, weight)
            if (key := RESIDUAL + name) in new_shapes:
                writer.write(key, left)
    return TensorFile(path, sha256=writer.close())


def _update(
    config: RunConfig,
    beta: float,
    name: str,
    grad: Tensor,
    state: Mapping[str, Tensor],
    new_state: Tensors,
) -> Tensor:
    """The direction of the step for one tensor, per unit of learning rate; fills `new_state`."""
    if config.outer_optimizer == "fedavg":
        return grad
    momentum = state.get(f"momentum.{name}", torch.zeros_like(grad))
    if config.outer_optimizer == "nesterov":
        momentum = beta * momentum + grad
        new_state[f"momentum.{name}"] = momentum
        return grad + beta * momentum
    square = state.get(f"square.{name}", torch.zeros_like(grad))
    momentum = beta * momentum + (1 - beta) * grad
    square = ADAM_BETA2 * square + (1 - ADAM_BETA2) * grad * grad
    new_state[f"momentum.{name}"] = momentum
    new_state[f"square.{name}"] = square
    step = float(new_state["step"])
    denominator = (square / (1 - ADAM_BETA2**step)).sqrt() + ADAM_EPSILON
    return momentum / (1 - beta**step) / denominator
