"""What a run is said to take is what its tensors and files are."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochat.errors import UserError
from pilot import plan
from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.rules.outer import Coded, outer_step, outer_step_in_place
from pilot.run.sizes import Sizes, sizes
from pilot.run.snapshot import Snapshot, write_snapshot
from pilot.run.state import RoundRecord, RunState
from pilot.site.inner_state import InnerState
from pilot.site.ranks import Ranks
from pilot.tensor_file import TensorFile, write_tensors
from pilot.wire.codec import decode, encode
from pilot.wire.messages import Fence
from scripts.sizes import PAGE, main, with_table


def _config(depth: int, **values: Any) -> RunConfig:
    small = {"depth": depth, "vocab-size": 300, "sequence-len": 16, "total-batch-size": 64}
    return RunConfig.from_mapping(small | values)


def _payload(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8", "int4", "sparse"])
def test_messages_are_what_is_sent_and_spilled(
    tmp_path: Path, arch: str, depth: int, wire: str
) -> None:
    config = _config(depth, **{"arch": arch, "wire-up": wire})
    said = sizes(config, rows=1)
    weights = plan.initial_weights(config)
    update = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
    assert said.parameters == sum(tensor.numel() for tensor in weights.values())
    assert said.order == sum(len(part.data) for part in encode(weights))
    reply = encode(update, wire=wire)
    assert said.reply == sum(len(part.data) for part in reply)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    save_file(decode(reply, shapes=shapes), tmp_path / "spilled")
    assert said.spilled == _payload(tmp_path / "spilled")


@pytest.mark.parametrize("outer", ["fedavg", "nesterov", "adam"])
def test_snapshots_are_what_is_on_disk(tmp_path: Path, outer: str) -> None:
    config = _config(2, **{"outer-optimizer": outer, "outer-lr": 0.1})
    weights = plan.initial_weights(config)
    weights, state = outer_step(config, weights, weights, {})
    path = write_snapshot(tmp_path, Snapshot(1, weights, state, {}), keep=1)
    found = sum(_payload(file) for file in path.glob("*.safetensors"))
    step = 4 if outer == "adam" else 0  # a count
    assert found == sizes(config, rows=1).snapshot + step


def test_steps_and_their_residual_are_what_is_on_disk(tmp_path: Path) -> None:
    config = _config(2, **{"wire-down": "int4", "mirror-history": 2})
    weights = plan.initial_weights(config)
    state = RunState(
        config,
        weights,
        Ledger(num_shards=1, epochs=1, shard_order=lambda _: range(1)),
        total_tokens=10**9,
    )
    for number in range(1, 4):
        record = RoundRecord(number, "x", 1, 1, 1.0, None)
        write_tensors(
            tmp_path / "update", {name: torch.ones_like(t) for name, t in weights.items()}
        )
        update, spooled = TensorFile(tmp_path / "update"), tmp_path / f"outer-{number}"

        def step(coded: Coded | None, update: TensorFile = update, to: Path = spooled) -> Any:
            return outer_step_in_place(config, state.weights, update, state.outer, to, coded=coded)

        state.absorb(record, [], step)
    path = write_snapshot(tmp_path / "snapshots", state.to_snapshot(term=1), keep=1)
    found = sum(_payload(file) for file in path.glob("*.safetensors"))
    said = sizes(config, rows=1)
    assert found == said.snapshot and said.step == found_step(path)
    assert said.site_disk - sizes(_config(2), rows=1).site_disk == 2 * said.order


def found_step(snapshot: Path) -> int:
    return _payload(next(snapshot.glob("step-*")))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_states_are_what_is_on_disk(tmp_path: Path, depth: int, dtype: torch.dtype) -> None:
    config, cpu = _config(depth), torch.device("cpu")
    model = plan.build_model(config, device=cpu, compute_dtype=dtype)
    optimizer = plan.make_optimizer(config, model)
    for parameter in model.parameters():
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    InnerState(tmp_path, Ranks(0, 1, cpu, None)).keep(optimizer, Fence("r", 1, 1, 1))
    (path,) = tmp_path.iterdir()
    counts = 8 * sum(
        not isinstance(value, Tensor)
        for values in optimizer.state.values()
        for value in values.values()
    )
    said = sizes(config, rows=1, compute_dtype=dtype)
    assert _payload(path) == said.inner_state + counts
    assert said.site_disk == 2 * said.inner_state, "the round's, and the one that it began with"
    assert sizes(_config(depth, **{"inner-state": "reset"}), rows=1).site_disk == 0


def test_more_clients_and_ranks_take_more() -> None:
    def of(**more: int) -> Sizes:
        return sizes(_config(2), rows=1, **more)

    assert of(clients=3).server_disk - of().server_disk == of().spilled
    assert of(clients=3).superlink_memory - of().superlink_memory == of().reply
    assert of(gpus=2).ranks_memory > of().ranks_memory
    assert of().shm == 0 and of(gpus=2).shm == 1 << 30


def test_table_of_the_docs_is_what_is_computed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run `python -m scripts.sizes --table`"


def test_sizes_are_printed_and_mistakes_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sizes", *arguments])
        main()
        return capsys.readouterr().out

    figures = json.loads(run("--depth", "2", "--vocab-size", "300", "--json"))
    table = 320 * 128  # elements of the embeddings: the vocabulary is padded to 320
    assert figures["order"] == 4 * figures["parameters"] == figures["gpu"]["weights"] + 2 * table
    assert "server: disk" in run("--depth", "2", "--clients", "4")
    for wrong in (["--gpus", "0"], ["--depth", "0"], ["--run-config", "dept=3"]):
        with pytest.raises(UserError, match=r"at least|between|unknown"):
            run(*wrong)
