"""The training step: any number of ranks takes the same global step, and all stop together."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from zygote import Zygote

from nanochat.errors import UserError
from nanochat.schedule import Hyper
from nanochat.trainer import Trainer, rank_slice

from . import step_worker

Results = dict[int, list[dict[str, Any]]]  # by world size, then rank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Results:
    """What one process alone and real gloo groups of 2 and 3 came to."""
    directory = tmp_path_factory.mktemp("ranks")
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    names = [(rank, size) for size in (2, 3) for rank in range(size)]
    processes = [
        zygote.start([step_worker.__file__, str(directory), str(rank), str(size)], env=environ)
        for rank, size in names
    ]
    try:
        alone = step_worker.run(0, 1)
        for process in processes:
            output, errors = process.communicate(timeout=240)
            assert process.wait() == 0, output + errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: Results = {1: [alone], 2: [], 3: []}
    for rank, size in names:
        found[size].append(torch.load(directory / f"rank{rank}of{size}.pt", weights_only=True))
    return found


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("size", [2, 3])
def test_n_processes_take_the_same_global_steps_as_one(
    results: Results, arch: str, size: int
) -> None:
    alone = results[1][0]
    for name, weight in results[size][0][arch].items():
        torch.testing.assert_close(weight, alone[arch][name], atol=2e-5, rtol=1e-4, msg=name)
    nats = sum(result[f"{arch} nats"] for result in results[size])
    torch.testing.assert_close(nats, alone[f"{arch} nats"], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_in_bf16_they_take_them_up_to_the_rounding_of_the_tables_gradients(
    results: Results, size: int
) -> None:
    alone, several = results[1][0], results[size]
    start = step_worker.make("bf16")[0].state_dict()
    for name, weight in several[0]["bf16"].items():
        moved = (alone["bf16"][name].double() - start[name].double()).norm()
        apart = (alone["bf16"][name].double() - weight.double()).norm()
        assert weight.dtype == start[name].dtype
        assert apart <= 0.1 * moved, f"{name}: {apart / moved:.3f}"
    nats = sum(result["bf16 nats"] for result in several)
    torch.testing.assert_close(nats, alone["bf16 nats"], atol=0.0, rtol=0.002)


@pytest.mark.parametrize("arch", step_worker.VARIANTS)
@pytest.mark.parametrize("size", [2, 3])
def test_weights_are_bit_identical_on_all_ranks(results: Results, arch: str, size: int) -> None:
    first, *others = results[size]
    for other in others:
        for name, weight in first[arch].items():
            assert torch.equal(weight, other[arch][name]), name


@pytest.mark.parametrize("arch", step_worker.VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stop_at_any_micro_step_ends_all_ranks_and_leaves_no_trace(
    results: Results, arch: str, size: int
) -> None:
    for result in results[size]:
        assert result[f"{arch} untouched"]
        assert result[f"{arch} gradients dropped"]


@pytest.mark.parametrize("size", [2, 3])
def test_bpb_is_the_same_on_any_number_of_ranks(results: Results, size: int) -> None:
    values = [result["bpb"] for result in results[size]]
    assert len(set(values)) == 1
    assert values[0] == pytest.approx(results[1][0]["bpb"], rel=1e-5)


def test_every_row_of_a_micro_batch_is_one_ranks() -> None:
    for world_size in (1, 2, 3, 8):
        for num_rows in range(20):
            slices = [
                rank_slice(num_rows, rank=r, world_size=world_size) for r in range(world_size)
            ]
            taken = [row for s in slices for row in range(num_rows)[s]]
            sizes = [len(range(num_rows)[s]) for s in slices]
            assert taken == list(range(num_rows))
            assert max(sizes) - min(sizes) <= 1


def test_a_step_is_that_of_the_mean_loss_over_all_its_targets() -> None:
    hyper = Hyper(lr_multiplier=0.7, momentum=0.91, weight_decay=0.03)
    model, optimizer = step_worker.make("classic")
    trainer = Trainer(model, optimizer, device=torch.device("cpu"), device_batch_rows=2)
    rows = step_worker.rows(0)
    nats = trainer.step(rows, hyper=hyper)

    plain, plain_optimizer = step_worker.make("classic")
    ids = torch.from_numpy(rows.astype(np.int64))
    loss = plain(ids[:, :-1], ids[:, 1:])
    loss.backward()
    for group in plain_optimizer.param_groups:
        group["lr"] = 0.7 * group["initial_lr"]
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = 0.91, 0.03
    plain_optimizer.step()

    assert nats is not None
    assert float(nats) == pytest.approx(float(loss.detach()) * rows.shape[0] * 16, rel=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=2e-5, rtol=1e-4)


def test_training_in_float16_is_refused() -> None:
    model, optimizer = step_worker.make("classic")
    model.compute_dtype = torch.float16
    with pytest.raises(UserError, match="bfloat16 or float32"):
        Trainer(model, optimizer, device=torch.device("cpu"), device_batch_rows=1)


def test_device_batch_of_no_rows_is_refused() -> None:
    model, optimizer = step_worker.make("classic")
    with pytest.raises(ValueError, match="at least 1"):
        Trainer(model, optimizer, device=torch.device("cpu"), device_batch_rows=0)


class _SmallDevice:
    """A model's forward that has memory for `most` rows at once; `tried` are the sizes it was given."""

    def __init__(self, trainer: Trainer, most: int) -> None:
        self._forward, self._most = trainer.model.forward, most
        self.tried: list[int] = []

    def __call__(self, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.tried.append(len(ids))
        if len(ids) > self._most:
            # in the backward pass, as it often is: some gradients are there by then
            loss: torch.Tensor = self._forward(ids, *args, **options)
            loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._forward(ids, *args, **options)


def _trainer_of(rows_at_once: int) -> tuple[Trainer, np.ndarray]:
    model, optimizer = step_worker.make("classic")
    trainer = Trainer(model, optimizer, device=torch.device("cpu"), device_batch_rows=rows_at_once)
    length = model.config.sequence_len
    rows = np.random.default_rng(3).integers(0, model.config.vocab_size, (16, length + 1))
    return trainer, rows.astype(np.uint16)


_HYPER = Hyper(lr_multiplier=1.0, momentum=0.9, weight_decay=0.1)


def test_more_rows_than_memory_are_taken_in_halves_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = []
    for rows_at_once in (2, 8):
        trainer, rows = _trainer_of(rows_at_once)
        small = _SmallDevice(trainer, most=3)
        monkeypatch.setattr(trainer.model, "forward", small)
        for _ in range(2):
            assert trainer.step(rows, hyper=_HYPER) is not None
        weights.append(trainer.model.state_dict())
    assert small.tried[:4] == [8, 4, 2, 2], "what does not fit is tried once"
    assert set(small.tried[3:]) == {2}
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert "8 rows" in caplog.text
    assert "it takes 2" in caplog.text


def test_a_model_that_does_not_fit_at_all_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, rows = _trainer_of(4)
    monkeypatch.setattr(trainer.model, "forward", _SmallDevice(trainer, most=0))
    with pytest.raises(UserError, match=r"memory of cpu is too small .* device-batch-size"):
        trainer.step(rows, hyper=_HYPER)
