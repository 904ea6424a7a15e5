"""The mirror of a client: it trains from the bits that its order names, or asks for the whole model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilot.config import RunConfig
from pilot.site.handle import WorkerHandle
from pilot.site.mirror import Mirror, MirrorError, digest_on_disk, mirror_path
from pilot.wire.codec import CodecError, encode
from pilot.wire.messages import Fence, Part, TrainOrder, TrainReply, from_header, to_header
from pilot.wire.steps import apply_step, digest_of, encode_step, numbered

from ..worker_kit import first_weights, site_config, train_order

CONFIG = RunConfig(run_name="r", wire_down="int4")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


class Server:
    """Versions 0 to 4 of a model, and the steps between them."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"m": (64, 80), "v": (9,)}
        weights = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        self.models, self.steps = [weights], list[list[Part]]()
        residual: dict[str, Tensor] = {}
        for _ in range(4):
            wanted = {n: t + torch.randn(t.shape, generator=generator) for n, t in weights.items()}
            weights, residual, parts = encode_step(weights, wanted, residual.get, wire="int4")
            self.models.append(weights)
            self.steps.append(parts)
        self.digests = [digest_of(model) for model in self.models]

    def whole(self, version: int, **values: Any) -> tuple[TrainOrder, list[Part]]:
        parts = [
            Part(part.name, part.dtype, part.shape, bytearray(part.data))
            for part in encode(self.models[version])
        ]
        return self.order(version, whole=True, **values), parts

    def towards(self, version: int, first: int, **values: Any) -> tuple[TrainOrder, list[Part]]:
        steps = self.steps[first:version]
        parts = [part for i, step in enumerate(steps) for part in numbered(i, step)]
        befores = self.digests[first:version]
        return self.order(version, whole=False, steps=befores, **values), parts

    def order(self, version: int, **values: Any) -> TrainOrder:
        values = {"fence": Fence("r", 1, version + 1, 1)} | values
        return train_order(CONFIG, [], digest=self.digests[version], **values)


def test_steps_lead_to_the_model_of_the_order_in_memory_and_from_disk() -> None:
    server, mirror = Server(), Mirror()
    order, parts = server.whole(0)
    taken = mirror.take(order, parts)
    assert taken is not None and digest_of(taken) == server.digests[0]
    mirror.keep(order)
    for version in (1, 2):
        order, parts = server.towards(version, version - 1)
        taken = mirror.take(order, parts)
        assert taken is not None and digest_of(taken) == server.digests[version]
        assert mirror.held(order) == server.digests[version]
    assert digest_on_disk(mirror_path("r", "c")) == server.digests[0], "two rounds were not kept"
    mirror.keep(order)
    later = Mirror()  # of the next group
    order, parts = server.towards(4, 1)  # of these it has missed two, and knows one
    taken = later.take(order, parts)
    assert taken is not None and digest_of(taken) == server.digests[4]
    again = later.take(order, parts)
    assert again is not None and digest_of(again) == server.digests[4], "the same order, once more"
    same = later.take(server.order(4, whole=False), [])
    assert same is not None and digest_of(same) == server.digests[4], "nothing needs to be sent"


def test_a_mirror_that_does_not_fit_takes_nothing_and_says_what_it_is() -> None:
    server, mirror = Server(), Mirror()
    order, parts = server.towards(2, 1)
    assert mirror.take(order, parts) is None and mirror.held(order) == ""
    mirror.take(*server.whole(0))
    assert mirror.take(order, parts) is None and mirror.held(order) == server.digests[0]
    taken = mirror.take(*server.towards(2, 0))
    assert taken is not None and digest_of(taken) == server.digests[2]
    other = Server(seed=1)  # another run
    assert mirror.take(*other.towards(2, 1)) is None


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "digest", "another"])
def test_a_damaged_mirror_on_disk_is_never_trained_from(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, mirror = Server(), Mirror()
    order, parts = server.whole(1)
    mirror.take(order, parts)
    mirror.keep(order)
    path = mirror_path("r", "c")
    raw = bytearray(path.read_bytes())
    if damage == "bit":
        raw[-7] ^= 4
    if damage in ("bit", "cut", "empty"):
        path.write_bytes({"bit": raw, "cut": raw[:-50], "empty": b""}[damage])
    if damage == "digest":
        save_file(server.models[1], path, metadata={"digest": "../" * 21 + "x"})
    if damage == "another":
        save_file(server.models[0], path, metadata={"digest": server.digests[1]})
    with caplog.at_level(logging.WARNING):
        for order, parts in (server.towards(2, 1), (server.order(1, whole=False), [])):
            fresh = Mirror()
            assert fresh.take(order, parts) is None and fresh.held(order) == ""
    assert ("damaged" in caplog.text or "cannot be read" in caplog.text) or damage == "digest"
    order, parts = server.whole(2)
    taken = fresh.take(order, parts)
    assert taken is not None and digest_of(taken) == server.digests[2]
    fresh.keep(order)
    assert digest_of(load_file(path)) == server.digests[2]


def test_a_mirror_that_is_damaged_in_memory_asks_for_the_model() -> None:
    server, mirror = Server(), Mirror()
    taken = mirror.take(*server.whole(0))
    assert taken is not None
    taken["v"][3] += 1
    order, parts = server.towards(1, 0)
    assert mirror.take(order, parts) is None and mirror.held(order) == ""


def test_a_whole_model_that_arrives_damaged_is_a_sentence() -> None:
    server, mirror = Server(), Mirror()
    order, parts = server.whole(0)
    assert isinstance(parts[0].data, bytearray)
    parts[0].data[5] ^= 1
    with pytest.raises(MirrorError, match="arrived damaged"):
        mirror.take(order, parts)
    assert mirror.held(order) == ""


def test_parts_that_are_no_step_are_a_sentence_and_half_a_step_is_no_mirror() -> None:
    server, mirror = Server(), Mirror()
    order, parts = server.whole(0)
    mirror.take(order, parts)
    order, parts = server.towards(1, 0)
    last = parts.pop()
    with pytest.raises(CodecError, match="no place"):
        mirror.take(order, [*parts, Part("0/other", "float32", last.shape, last.data)])
    assert mirror.held(order) == ""


def test_the_last_order_of_a_run_removes_the_mirror_and_a_full_disk_costs_a_warning(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, mirror = Server(), Mirror()
    order, parts = server.whole(0)
    mirror.take(order, parts)
    path = mirror_path("r", "c")
    path.parent.mkdir(parents=True)
    half = path.with_name(f".{path.name}.77.tmp")
    half.write_bytes(b"of a process that was killed")
    mirror.keep(order)
    assert path.exists() and not half.exists()
    order, parts = server.whole(1, run_is_over=True)
    mirror.take(order, parts)
    mirror.keep(order)
    assert not path.exists() and mirror.held(order) == ""
    path.parent.rmdir()
    path.parent.write_bytes(b"no directory")
    order, parts = server.whole(0)
    mirror.take(order, parts)
    mirror.keep(order)
    assert "Cannot save the mirror" in caplog.text and mirror.held(order) == server.digests[0]


def test_with_full_models_nothing_is_held() -> None:
    server, mirror = Server(), Mirror()
    order = train_order(RunConfig(run_name="r"), [], digest=server.digests[0])
    taken = mirror.take(order, server.whole(0)[1])
    assert taken is not None and digest_of(taken) == server.digests[0]
    mirror.keep(order)
    assert mirror.held(order) == "" and not mirror_path("r", "c").exists()
    step = {n: t.clone() for n, t in server.models[0].items()}
    apply_step(step, server.steps[0])
    assert digest_of(step) == server.digests[1]


def test_clients_with_other_numbers_of_ranks_hold_the_same_bits(site: Path) -> None:
    config = site_config(site, wire_down="int4", worker_idle=0.0, round_steps=1)
    weights = first_weights(config)
    wanted = {name: t + 0.01 * torch.randn(t.shape) for name, t in weights.items()}
    moved, _, step = encode_step(weights, wanted, {}.get, wire="int4")
    whole = {"digest": digest_of(weights)}
    steps = {"digest": digest_of(moved), "whole": False, "steps": [digest_of(weights)]}
    loads: list[tuple[dict[str, Any], list[Part]]] = [
        (whole, encode(weights)),
        (steps, list(numbered(0, step))),
    ]
    for client, processes in (("one", 1), ("two", 2)):
        for number, (model, parts) in enumerate(loads, start=1):
            fence = Fence("r", 1, number, number)
            order = train_order(
                config, [[0, 0, 0, 7]], fence=fence, client=client, processes=processes, **model
            )
            with WorkerHandle(processes=processes, device="cpu") as worker:
                reply = from_header(worker.ask(to_header(order), list(parts))[0])
            assert isinstance(reply, TrainReply) and (reply.steps, reply.error) == (1, "")
            assert reply.mirror == model["digest"] == digest_on_disk(mirror_path("r", client))
    files = [mirror_path("r", client).read_bytes() for client in ("one", "two")]
    assert files[0] == files[1]
    apply_step(weights, step)
    assert digest_of(weights) == digest_of(moved)
