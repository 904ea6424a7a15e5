"""The outer step against torch.optim, which has the same three formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.files import sha256_file
from pilot.config import RunConfig
from pilot.rules.outer import (
    ADAM_BETA2,
    ADAM_EPSILON,
    RESIDUAL,
    OuterRates,
    outer_step,
    outer_step_in_place,
    restores_lengths,
)
from pilot.tensor_file import TensorFile, write_tensors
from pilot.wire.steps import StepEncoder, apply_step, encode_step

STEPS = 7
SHAPES = {"a": (3, 4), "b": (5,), "scalar": (), "empty": (0,)}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7)


def nesterov(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.7, betas=(0.9, ADAM_BETA2), eps=ADAM_EPSILON)


@pytest.mark.parametrize(
    ("name", "make"), [("fedavg", sgd), ("nesterov", nesterov), ("adam", adam)]
)
def test_outer_step_is_that_of_torch_over_several_steps(
    name: str, make: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> None:
    config = RunConfig(outer_optimizer=name, outer_lr=0.7, outer_momentum=0.9)
    weights, state = tensors(0), {}  # type: ignore[var-annotated]
    expected = {key: value.clone() for key, value in weights.items()}
    optimizer = make(list(expected.values()))
    for step in range(1, STEPS + 1):
        gradient = tensors(step)
        weights, state = outer_step(config, weights, gradient, state)
        for key, value in expected.items():
            value.grad = gradient[key].clone()
        optimizer.step()
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)
        assert all(value.dtype == torch.float32 for value in [*weights.values(), *state.values()])


@pytest.mark.parametrize("name", ["fedavg", "nesterov", "adam"])
def test_step_changes_neither_its_inputs_nor_depends_on_them_later(name: str) -> None:
    config = RunConfig(outer_optimizer=name, outer_lr=0.1)
    weights, first_state = outer_step(config, tensors(0), tensors(1), {})
    inputs: list[dict[str, Tensor]] = [weights, tensors(2), first_state]
    before = [{key: value.clone() for key, value in one.items()} for one in inputs]
    new_weights, new_state = outer_step(config, *inputs)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    again: Any = outer_step(config, *before)
    torch.testing.assert_close((new_weights, new_state), again, rtol=0, atol=0)


def test_fedavg_of_rate_one_gives_the_mean_of_the_clients_weights() -> None:
    config = RunConfig(outer_optimizer="fedavg", outer_lr=1.0)
    start, clients = tensors(0), [tensors(1), tensors(2)]
    mean = {key: sum(start[key] - one[key] for one in clients) / 2 for key in start}
    weights, state = outer_step(config, start, mean, {})  # type: ignore[arg-type]
    for key, value in weights.items():
        torch.testing.assert_close(value, (clients[0][key] + clients[1][key]) / 2)
    assert state == {}


def test_other_tensors_than_the_models_are_refused() -> None:
    gradient = tensors(1)
    del gradient["b"]
    with pytest.raises(ValueError, match="different names"):
        outer_step(RunConfig(), tensors(0), gradient, {})


# -- auto ----------------------------------------------------------------------------------------------


def test_auto_is_the_mean_of_the_clients_models_and_a_number_is_kept() -> None:
    assert OuterRates.of(RunConfig()) == OuterRates(1.0, 0.0)
    assert OuterRates.of(RunConfig(outer_optimizer="fedavg")) == OuterRates(1.0, 0.0)
    assert OuterRates.of(RunConfig(outer_lr=0.5)) == OuterRates(0.5, 0.0)
    assert OuterRates.of(RunConfig(outer_lr=0.0, outer_momentum=0.9)) == OuterRates(0.0, 0.9)
    assert OuterRates.of(RunConfig(outer_optimizer="adam", outer_lr=0.1)) == OuterRates(0.1, 0.9)
    weights, gradient = tensors(0), tensors(1)
    stepped, _ = outer_step(RunConfig(), weights, gradient, {})
    for key, weight in weights.items():
        torch.testing.assert_close(stepped[key], weight - gradient[key])
    assert restores_lengths(RunConfig()) and not restores_lengths(RunConfig(outer_lr=1.0))


@pytest.mark.parametrize("name", ["fedavg", "nesterov", "adam"])
def test_step_in_place_and_on_disk_has_the_bits_of_the_step_in_memory(
    name: str, tmp_path: Path
) -> None:
    config = RunConfig(outer_optimizer=name, outer_lr=0.3, outer_momentum=0.9)
    shapes = SHAPES | {"long": (1000, 3, 100), "wide": (4, 70_000)}

    def some(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    weights, state, expected, expected_state = some(0), {}, some(0), {}  # type: ignore[var-annotated]
    memory = [tensor.data_ptr() for tensor in weights.values()]
    for step in range(1, 4):
        expected, expected_state = outer_step(config, expected, some(step), expected_state)
        gradient, path = tmp_path / f"gradient-{step}", tmp_path / f"state-{step}"
        write_tensors(gradient, some(step))
        state = outer_step_in_place(config, weights, TensorFile(gradient), state, path)  # type: ignore[assignment]
        assert state.sha256 == sha256_file(path)  # type: ignore[attr-defined]
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        torch.testing.assert_close(dict(state), expected_state, rtol=0, atol=0)
    assert memory == [tensor.data_ptr() for tensor in weights.values()]


@pytest.mark.parametrize("wire", ["int8", "int4", "sparse"])
@pytest.mark.parametrize("name", ["fedavg", "nesterov", "adam"])
def test_coded_step_leads_where_its_parts_do_and_keeps_what_they_could_not_say(
    name: str, wire: str, tmp_path: Path
) -> None:
    config = RunConfig(outer_optimizer=name, outer_lr=0.3, outer_momentum=0.9)
    shapes = SHAPES | {"long": (1000, 3, 100), "wide": (4, 70_000), "table": (64, 80)}

    def some(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    weights, mirror, expected, state = some(0), some(0), some(0), dict[str, Tensor]()
    momenta, residual = dict[str, Tensor](), dict[str, Tensor]()
    for step in range(1, 4):
        wanted, momenta = outer_step(config, expected, some(step), momenta)
        expected, residual, _ = encode_step(expected, wanted, residual.get, wire=wire)
        gradient, path = tmp_path / f"gradient-{step}", tmp_path / f"state-{step}"
        write_tensors(gradient, some(step))
        rests = {key.removeprefix(RESIDUAL): rest for key, rest in state.items()}
        coded = StepEncoder(rests.get, wire=wire)
        found = outer_step_in_place(config, weights, TensorFile(gradient), state, path, coded=coded)
        assert found.sha256 == sha256_file(path)
        state = dict(found)
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        assert residual.keys() == {"long", "wide", "table"}
        rests = {RESIDUAL + key: rest for key, rest in residual.items()}
        torch.testing.assert_close(state, momenta | rests, rtol=0, atol=0)
        apply_step(mirror, coded.parts)
        torch.testing.assert_close(mirror, weights, rtol=0, atol=0)
