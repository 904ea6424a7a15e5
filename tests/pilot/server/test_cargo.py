"""What an order carries of the model follows from the mirror that its client says it has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.run.state import RoundRecord, RunState
from pilot.server.cargo import Cargo
from pilot.wire.codec import decode, encode, message_bytes
from pilot.wire.steps import digest_of

from ..grid_fixture import ManualClock
from ..step_kit import leads_to

CONFIG = RunConfig(run_name="r", num_shards=3, wire_down="int4", mirror_history=3)
SHAPE = (64, 80)


class Run:
    """A run whose rounds merge something random."""

    def __init__(self, config: RunConfig = CONFIG) -> None:
        ledger = Ledger(num_shards=3, epochs=1, shard_order=lambda _: range(3))
        weights = {"m": torch.randn(SHAPE), "v": torch.randn(5)}
        self.state = RunState(config, weights, ledger, total_tokens=10**6)
        self.clock = ManualClock()
        self.cargo = Cargo(self.state, self.clock)
        self.models = [_copy(weights)]

    def round(self) -> None:
        number = self.state.round_number + 1
        wanted = {n: t + 0.1 * torch.randn(t.shape) for n, t in self.state.weights.items()}
        record = RoundRecord(number, "x", 1, 1, 1.0, None)
        self.state.absorb(record, [], leads_to(self.state, wanted))
        self.models.append(_copy(self.state.weights))

    def digest(self, round_number: int) -> str:
        return digest_of(self.models[round_number])


def _copy(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.items()}


def test_a_client_gets_the_steps_that_it_misses_and_else_the_model() -> None:
    run = Run()
    for _ in range(5):
        run.round()
    step = message_bytes([SHAPE, (5,)], wire="int4")
    for at, steps in ((5, 0), (4, 1), (3, 2), (2, 3)):
        load = run.cargo.for_mirror(run.digest(at))
        assert (load.whole, load.digest) == (False, run.digest(5))
        assert list(load.steps) == [run.digest(n) for n in range(at, 5)]
        assert load.num_bytes == steps * step
    for mirror in (run.digest(1), "", "0" * 64):
        load = run.cargo.for_mirror(mirror)
        assert load.whole and load.steps == () and load.num_bytes == 4 * (64 * 80 + 5)


def test_what_many_ask_for_at_once_is_encoded_once_and_not_kept_for_long() -> None:
    run = Run()
    run.round()
    for mirror in ("", run.digest(0)):
        first = run.cargo.for_mirror(mirror)
        run.clock.at_s += 20
        assert run.cargo.for_mirror(mirror) is first
        run.clock.at_s += 20
        assert run.cargo.for_mirror(mirror) is first
        run.clock.at_s += 31
        run.cargo.forget()
        assert not run.cargo._loads
    before = run.cargo.for_mirror("")
    run.round()
    run.cargo.forget()
    assert not run.cargo._loads and run.cargo.for_mirror("").digest != before.digest


def test_steps_that_are_more_than_the_model_are_not_sent() -> None:
    run = Run(replace(CONFIG, wire_down="int8", mirror_history=100))
    for _ in range(6):
        run.round()
    assert not run.cargo.for_mirror(run.digest(3)).whole, "three bytes a value"
    assert run.cargo.for_mirror(run.digest(2)).whole, "four and a little"


def test_a_step_that_cannot_be_read_any_more_costs_the_model(tmp_path: Path) -> None:
    run = Run()
    run.round()
    run.round()
    for step in run.state.last_steps:
        step.moved(tmp_path, keep_parts=step is run.state.last_steps[-1])
    assert run.cargo.for_mirror(run.digest(0)).whole
    assert not run.cargo.for_mirror(run.digest(1)).whole


def test_with_full_models_every_order_has_all_of_it_and_its_digest() -> None:
    run = Run(replace(CONFIG, wire_down="full"))
    run.round()
    load = run.cargo.for_mirror(run.state.digest)
    assert load.whole and load.digest == run.digest(1) and not run.state.last_steps
    assert decode(encode(run.state.weights)).keys() == {"m", "v"}


@pytest.mark.parametrize("ends", ["rounds", "tokens"])
def test_the_last_merge_is_whole_and_leads_on_from_no_mirror(ends: str) -> None:
    config = replace(CONFIG, num_rounds=3 if ends == "rounds" else 0)
    run = Run(config)
    run.state.total_tokens = 10**6 if ends == "rounds" else 3
    wanted_in_all = _copy(run.state.weights)
    for number in range(1, 4):
        change = {n: 0.1 * torch.randn(t.shape) for n, t in wanted_in_all.items()}
        wanted_in_all = {n: t + change[n] for n, t in wanted_in_all.items()}
        wanted = {n: t + change[n] for n, t in run.state.weights.items()}
        record = RoundRecord(number, "x", 1, 1, 1.0, None)
        momentum = {"momentum.m": torch.ones(1)}
        run.state.absorb(record, [], leads_to(run.state, wanted, momentum))
        residual = [name for name in run.state.outer if name.startswith("residual.")]
        assert bool(residual) == bool(run.state.last_steps) == (number < 3)
    assert run.state.finished
    for name, tensor in wanted_in_all.items():
        torch.testing.assert_close(run.state.weights[name], tensor, rtol=0, atol=2e-6)
    assert run.cargo.for_mirror(run.digest(0)).whole


def test_a_run_that_ends_without_a_merge_has_all_that_was_wanted_too() -> None:
    run = Run(replace(CONFIG, num_rounds=2))
    run.round()
    held, residual = run.state.weights["m"].clone(), run.state.outer["residual.m"]
    run.state.absorb(RoundRecord(2, "nobody-left", 0, 0, 1.0, None), [], None)
    assert torch.equal(run.state.weights["m"], held + residual) and run.state.outer == {}
