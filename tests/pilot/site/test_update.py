"""The rest of an update, from round to round: that of what was merged, or none."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat.gpt import GPT
from pilot import plan
from pilot.config import RunConfig
from pilot.site.update import Encoder, pseudo_gradient
from pilot.wire.codec import DECAY, decode
from pilot.wire.codes import CODES
from pilot.wire.messages import Fence

from ..worker_kit import train_order

SHAPES = {"matrix": (64, 80), "vector": (80,), "small": (8, 8)}
CPU = torch.device("cpu")


def fence(round_number: int, lease_id: int = 1, term: int = 1) -> Fence:
    return Fence("r", term, round_number, lease_id)


class Site:
    """A client that sends the same update in each order."""

    def __init__(self, directory: Path, wire: str = "int4") -> None:
        self.directory, self.encoder = directory, Encoder(directory, wire)

    def send(self, order_of: Fence, merged: Fence | None = None) -> dict[str, Tensor]:
        """What arrives."""
        generator = torch.Generator().manual_seed(0)
        update = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        order = train_order(RunConfig(), [], fence=order_of, last_merged_fence=merged)
        parts = self.encoder.encode(update, order, CPU)
        self.encoder.keep()
        self.encoder.keep()  # nothing is left to write
        return decode(parts, shapes=SHAPES)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("wire", DECAY)
def test_rest_is_added_if_its_update_was_merged_and_only_then(tmp_path: Path, wire: str) -> None:
    site = Site(tmp_path / "rest", wire)
    first = site.send(fence(1))
    second = site.send(fence(2), merged=fence(1))
    assert not same(second, first)
    assert same(site.send(fence(3), merged=fence(1)), second), "the reply of round 2 was lost"
    assert site.files == {"1-1-1.safetensors", "1-3-1.safetensors"}
    assert same(site.send(fence(4)), first), "and with a model that holds nothing of this client's"
    assert load_file(site.directory / "1-4-1.safetensors").keys() == {"matrix"}


def test_only_forms_that_leave_much_keep_a_rest(tmp_path: Path) -> None:
    for wire in ("float32", "bfloat16"):
        site = Site(tmp_path / wire, wire)
        assert same(site.send(fence(1)), site.send(fence(2), merged=fence(1)))
        assert not site.directory.exists()


def test_orders_of_one_round_begin_with_the_same_rest(tmp_path: Path) -> None:
    site = Site(tmp_path / "rest")
    site.send(fence(1))
    first = site.send(fence(2, 5), merged=fence(1))
    assert same(site.send(fence(2, 6), merged=fence(1)), first)
    assert {"1-2-5.safetensors", "1-2-6.safetensors"} <= site.files, "either may be the last merged"
    site.send(fence(3), merged=fence(2, 6))
    assert site.files == {"1-2-6.safetensors", "1-3-1.safetensors"}


def test_rest_of_an_earlier_start_of_the_server_is_found(tmp_path: Path) -> None:
    site = Site(tmp_path / "rest")
    site.send(fence(1))
    second = site.send(fence(2), merged=fence(1))
    assert same(site.send(fence(2, term=2), merged=fence(1)), second)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_rest_that_cannot_be_read_costs_itself_and_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    site = Site(tmp_path / "rest")
    first = site.send(fence(1))
    path = site.directory / "1-1-1.safetensors"
    (site.directory / ".1-1-1.safetensors.77.tmp").write_bytes(b"of a process that was killed")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"")
    with caplog.at_level(logging.INFO):
        assert same(site.send(fence(2), merged=fence(1)), first)
    assert "starting without" in caplog.text
    assert not [name for name in site.files if name.endswith(".tmp")]


def test_disk_that_refuses_costs_the_rest_and_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rest").write_bytes(b"no directory")
    site = Site(tmp_path / "rest")
    first = site.send(fence(1))
    assert "Cannot save the rest of an update" in caplog.text
    assert same(site.send(fence(2), merged=fence(1)), first)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", *DECAY])
def test_it_says_which_share_of_an_update_and_its_rest_the_code_lost(
    tmp_path: Path, wire: str
) -> None:
    """By what arrives: of the matrix, which is coded; the vector and the small one travel as they are."""
    site = Site(tmp_path / "rest", wire)
    assert site.encoder.lost is None
    generator = torch.Generator().manual_seed(0)
    wanted = {n: torch.randn(shape, generator=generator).double() for n, shape in SHAPES.items()}
    rest = torch.zeros(SHAPES["matrix"], dtype=torch.float64)
    for number in (1, 2):
        merged = fence(number - 1) if number > 1 else None
        arrived = site.send(fence(number), merged=merged)
        whole = {**wanted, "matrix": wanted["matrix"] + DECAY.get(wire, 0.0) * rest}
        rest = whole["matrix"] - arrived["matrix"].double()
        size = torch.cat([tensor.reshape(-1) for tensor in whole.values()]).norm()
        assert site.encoder.lost == pytest.approx(float(rest.norm() / size), rel=1e-4, abs=1e-9)
    low, high = {
        "float32": (0.0, 0.0),
        "bfloat16": (5e-4, 4e-3),
        "int8": (1e-3, 1e-2),
        "int4": (0.05, 0.2),
        "sparse": (0.5, 1.0),
    }[wire]
    assert site.encoder.lost is not None and low <= site.encoder.lost <= high


def test_an_update_that_is_no_number_has_lost_no_share_of_itself(tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, "bfloat16")
    order = train_order(RunConfig(), [], fence=fence(1))
    encoder.encode({"matrix": torch.full((64, 80), float("inf"))}, order, CPU)
    assert encoder.lost is None


@pytest.mark.parametrize("wire", ["bfloat16", *DECAY])
def test_embedding_rows_that_saw_no_token_cost_a_bit(wire: str, tmp_path: Path) -> None:
    """In all codes, as the optimizer leaves them: AdamW's decay is none of the default architecture's."""
    config = RunConfig(depth=1, vocab_size=640, sequence_len=16)
    model = GPT(plan.model_config(config), compute_dtype=torch.float32)
    model.init_weights()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    optimizer = plan.make_optimizer(config, model)
    tokens = torch.arange(64).view(4, 16) % 40
    for _ in range(2):
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    update = pseudo_gradient(model, weights)
    order = train_order(config, [], fence=fence(1))
    parts = Encoder(tmp_path / "rest", wire).encode(update, order, CPU)
    (table,) = [part for part in parts if part.name == "transformer.wte.weight"]
    head, sent = 2 * 640 // 16, 40 * table.shape[1]
    assert len(table.data) == head + sum(CODES[wire].sections(sent))
