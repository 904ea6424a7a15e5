"""What a client's optimizer carries from round to round: exactly what was merged, nothing else."""

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import nop
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from nanochat.acceleration import CompiledBlock, accelerated_block
from nanochat.trainer import Trainer
from pilot.config import RunConfig
from pilot.site import round as round_module
from pilot.site.inner_state import InnerState, inner_state_dir
from pilot.site.mirror import Mirror, digest_on_disk, mirror_path
from pilot.site.ranks import Ranks
from pilot.site.resident import Resident
from pilot.site.round import Round
from pilot.site.update import rest_dir
from pilot.wire.codec import DECAY, decode, encode
from pilot.wire.messages import Fence, Part
from pilot.wire.steps import FULL, digest_of, encode_step, numbered

from ..worker_kit import BATCH_ROWS, first_weights, site_config, train_order

SHARD_ROWS = 20  # of shard 0
ALONE = Ranks(0, 1, torch.device("cpu"), None)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


@dataclass
class Federation:
    """A server of one client: fedavg at rate 1, rows in order; `lease` is its next free row.

    It knows of the client's mirror what the last reply said that it has not lost.
    """

    config: RunConfig
    client: str
    weights: dict[str, Tensor]
    merged: Fence | None = None
    row: int = 0
    rounds: int = 0
    kept: Resident | None = None  # of a resident group
    mirror: Mirror = field(default_factory=Mirror)
    said: str = ""
    residual: dict[str, Tensor] = field(default_factory=dict)
    steps: list[tuple[str, list[Part]]] = field(default_factory=list)  # (digest before, parts)

    def load(self) -> tuple[dict[str, Any], list[Part]]:
        """What the next order says of the model, and its parts."""
        befores = [before for before, _ in self.steps]
        digest = digest_of(self.weights)
        if self.said == digest or self.said in befores:
            missing = self.steps[befores.index(self.said) :] if self.said in befores else []
            parts = [part for i, step in enumerate(missing) for part in numbered(i, step[1])]
            steps = [before for before, _ in missing]
            return {"digest": digest, "whole": False, "steps": steps}, parts
        copied = {name: weight.clone() for name, weight in self.weights.items()}
        return {"digest": digest}, encode(copied)

    def round(self, fate: str) -> None:
        """One round whose reply meets `fate`: merged, or lost, refused, or trained twice over."""
        self.rounds += 1
        fence = Fence(self.config.run_name, 1, self.rounds, 10 * self.rounds)
        for _ in range(2 if fate == "repeated" else 1):
            model, carried = self.load()
            order = train_order(
                self.config,
                segments(self.row, BATCH_ROWS * self.config.round_steps),
                fence=fence,
                client=self.client,
                committed_tokens=self.row * self.config.sequence_len,
                last_merged_fence=self.merged,
                **model,
            )
            weights = self.mirror.take(order, carried)
            assert weights is not None
            resident = self.kept is not None
            task = Round(order, ALONE, time.monotonic(), resident=resident, kept=self.kept)
            reply, parts = task.run(weights)
            task.keep_state()
            self.mirror.keep(order)
        if fate in ("lost", "refused"):
            return
        assert reply.tokens
        update = decode(parts, shapes={n: w.shape for n, w in self.weights.items()})
        self.said = reply.mirror or ""
        wanted = {name: weight - update[name] for name, weight in self.weights.items()}
        if self.config.wire_down == FULL:
            self.weights = wanted
        else:
            before = digest_of(self.weights)
            self.weights, self.residual, step = encode_step(
                self.weights, wanted, self.residual.get, wire=self.config.wire_down
            )
            self.steps.append((before, step))
        self.merged = fence
        self.row += reply.tokens // self.config.sequence_len

    def state(self, directory_of: Any = inner_state_dir) -> dict[str, bytes]:
        """The bytes of the state, or with `rest_dir` of the rest, that the last merged reply left."""
        directory = directory_of(self.config.run_name, self.client)
        assert self.merged is not None
        prefix = f"{self.merged.term}-{self.merged.round_number}-{self.merged.lease_id}."
        return {
            path.name.removeprefix(prefix): path.read_bytes()
            for path in directory.glob(f"{prefix}*")
        }


def segments(first: int, rows: int) -> list[list[int]]:
    """`rows` rows of shard 0 from `first` on, in as many epochs as that takes."""
    found = []
    while rows:
        epoch, row = divmod(first, SHARD_ROWS)
        taken = min(rows, SHARD_ROWS - row)
        found.append([epoch, 0, row, row + taken])
        first, rows = first + taken, rows - taken
    return found


def federation(site: Path, client: str, **values: Any) -> Federation:
    config = site_config(site, run_name="inner", round_steps=1, **values)
    return Federation(config, client, first_weights(config))


@pytest.mark.parametrize(
    ("wire", "down"),
    [
        ("float32", "full"),
        ("bfloat16", "int8"),
        ("int8", "sparse"),
        ("int4", "int4"),
        ("sparse", "int4"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("resident", [False, True])
def test_refused_lost_and_repeated_rounds_leave_no_trace_in_weights_optimizer_rest_or_mirror(
    site: Path, seed: int, wire: str, down: str, resident: bool
) -> None:
    case = f"{wire}-{resident}-{seed}"  # the site's disk is that of all cases
    fates = ["merged", "lost", "refused", "repeated", "merged"]
    random.Random(seed).shuffle(fates)
    troubled = federation(site, f"troubled-{case}", wire_up=wire, wire_down=down)
    troubled.kept = Resident() if resident else None
    for fate in fates:
        troubled.round(fate)
    calm = federation(site, f"calm-{case}", wire_up=wire, wire_down=down)
    for fate in fates:
        if fate in ("merged", "repeated"):
            calm.round("merged")
    assert troubled.state() and troubled.state() == calm.state()
    assert bool(calm.state(rest_dir)) == (wire in DECAY)
    assert troubled.state(rest_dir) == calm.state(rest_dir)
    assert troubled.residual.keys() == calm.residual.keys()
    for mine, other in ((calm.weights, troubled.weights), (calm.residual, troubled.residual)):
        for name, weight in mine.items():
            assert torch.equal(weight, other[name]), name
    held = []
    for one in (troubled, calm):
        one.round("merged")
        held.append(digest_on_disk(mirror_path("inner", one.client)))
    assert held[0] == held[1] and bool(held[0]) == (down != FULL)


def test_keeping_the_state_makes_rounds_of_one_step_equal_to_one_round_of_many(site: Path) -> None:
    kept, reset = federation(site, "kept"), federation(site, "reset", inner_state="reset")
    for _ in range(3):
        kept.round("merged")
        reset.round("merged")
    config = site_config(site, run_name="inner", round_steps=3)
    whole = Federation(config, "whole", first_weights(config))
    whole.round("merged")
    for name, weight in whole.weights.items():
        torch.testing.assert_close(kept.weights[name], weight, rtol=1e-5, atol=1e-6)
    differs = [n for n, w in whole.weights.items() if not torch.allclose(reset.weights[n], w)]
    assert differs, "without the state other weights come out: the comparison means something"
    assert not inner_state_dir("inner", "reset").exists()


def _compile_with_what_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerated(mode: str, **values: Any) -> Any:
        block = CompiledBlock(torch.device("cpu"), aot_autograd(fw_compiler=nop, bw_compiler=nop))
        return block, accelerated_block("off", **values)[1]

    monkeypatch.setattr(round_module, "accelerated_block", accelerated)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_second_round_of_a_group_reads_compiles_and_allocates_nothing(
    site: Path, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    if compiled == "on":
        _compile_with_what_needs_no_compiler(monkeypatch)
    group = federation(site, f"group-{compiled}")
    group.kept = kept = Resident()
    group.round("merged")
    model, optimizer, trainer = kept._model, kept._optimizer, kept._trainer
    assert model is not None and optimizer is not None and kept.holds == group.merged

    def memory() -> list[int]:
        state = [t for values in optimizer.state.values() for t in values.values()]
        tensors = [*model.state_dict().values(), *(t for t in state if isinstance(t, Tensor))]
        return [tensor.data_ptr() for tensor in tensors]

    def work() -> dict[str, dict[str, int]]:
        return {key: dict(counts) for key, counts in counters.items()}

    before, done = memory(), work()
    assert compiled == "off" or done["stats"]["unique_graphs"] >= 1
    with monkeypatch.context() as patch:
        patch.setattr(InnerState, "_read", lambda *_: pytest.fail("the state is in memory"))
        group.round("merged")
        group.round("merged")
    assert (kept._model, kept._optimizer, kept._trainer) == (model, optimizer, trainer)
    assert memory() == before and work() == done
    if compiled == "on":
        return
    alone = federation(site, f"alone-{compiled}")  # with new ones in each round
    for _ in range(3):
        alone.round("merged")
    for name, weight in alone.weights.items():
        assert torch.equal(weight, group.weights[name]), name


def test_group_makes_everything_again_for_another_configuration_or_a_fresh_state(
    site: Path,
) -> None:
    group = federation(site, "other")
    group.kept = kept = Resident()
    group.round("merged")
    model = kept._model
    group.config = site_config(site, run_name="inner", round_steps=1, lr=0.5)
    group.round("merged")
    assert kept._model is not model and kept.holds == group.merged
    group.merged = None  # as after a merge that was taken back
    group.round("lost")
    fresh = federation(site, "fresh", lr=0.5)
    fresh.weights, fresh.row, fresh.rounds = group.weights, group.row, group.rounds
    fresh.kept = alone = Resident()
    fresh.round("lost")
    for one, other in zip(
        kept.optimizer().state.values(), alone.optimizer().state.values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_damaged_or_missing_state_costs_the_state_and_not_the_round(site: Path) -> None:
    client = federation(site, "damaged")
    client.round("merged")
    for path in inner_state_dir("inner", "damaged").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    client.round("merged")
    for path in inner_state_dir("inner", "damaged").glob("*.safetensors"):
        path.unlink()
    client.round("merged")
    (path,) = inner_state_dir("inner", "damaged").glob("*.safetensors")
    half = path.with_name(f".{path.name}.1.tmp")  # of a process that was killed as it wrote
    half.write_bytes(b"half")
    older = {name: t[:1].clone() if t.dim() else t for name, t in load_file(path).items()}
    save_file(older, path)  # cut otherwise, by another version of the program
    client.round("merged")
    assert client.row == 4 * BATCH_ROWS and not half.exists()


def test_a_resident_group_writes_its_rest_when_its_reply_has_gone(site: Path) -> None:
    client = federation(site, "resident", wire_up="int4")
    order = train_order(
        client.config, segments(0, BATCH_ROWS), client="resident", fence=Fence("inner", 1, 1, 10)
    )
    task = Round(order, ALONE, time.monotonic(), resident=True)
    reply, _ = task.run(client.weights)
    assert reply.tokens and not rest_dir("inner", "resident").exists()
    task.keep_state()
    assert [p.name for p in rest_dir("inner", "resident").iterdir()] == ["1-1-10.safetensors"]


def test_the_final_order_removes_what_the_client_has_kept(site: Path) -> None:
    client = federation(site, "leaving", wire_up="int4")
    client.round("merged")
    assert client.state() and client.state(rest_dir)
    order = train_order(
        client.config, [], client="leaving", run_is_over=True, fence=Fence("inner", 1, 2, 0)
    )
    Round(order, ALONE, time.monotonic()).run(client.weights)
    assert not inner_state_dir("inner", "leaving").exists()
    assert not rest_dir("inner", "leaving").exists()


def test_client_without_a_resident_group_keeps_nothing_when_it_is_leaving(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group ends with its reply, which must not wait for the state."""
    client = federation(site, "drained", preempt_file=str(tmp_path / "notice"))
    client.round("merged")
    kept = client.state()
    whole = Trainer.step

    def noticed(*given: Any, **options: Any) -> Any:
        nats = whole(*given, **options)
        (tmp_path / "notice").touch()
        return nats

    monkeypatch.setattr(Trainer, "step", noticed)
    leaving: list[bool] = []
    counts = Round._row_counts

    def seen(task: Round, data: Any, stream: Any, stop: Any) -> Any:
        while not stop.leaving:
            time.sleep(0.01)
        leaving.append(True)
        return counts(task, data, stream, stop)

    monkeypatch.setattr(Round, "_row_counts", seen)
    before = client.merged
    client.round("merged")
    assert leaving and client.state() == {} and client.row == 2 * BATCH_ROWS
    client.merged = before
    assert client.state() == kept, "what that round began with is still there"


def test_a_state_of_another_number_of_processes_is_not_taken(site: Path) -> None:
    client = federation(site, "resized")
    client.round("merged")
    (path,) = inner_state_dir("inner", "resized").glob("*.safetensors")
    path.rename(path.with_name(path.name.replace("rank0of1", "rank0of2")))
    client.round("merged")
    names = [path.name for path in inner_state_dir("inner", "resized").glob("*")]
    assert names == ["1-2-20.rank0of1.safetensors"]


def test_a_second_order_of_a_round_leaves_what_the_first_one_left(site: Path) -> None:
    client = federation(site, "twice")
    client.round("merged")
    before = client.merged
    client.round("merged")
    first = client.state()
    assert first
    # asked again in that round, in vain: the reply to the first order is not merged yet
    order = train_order(
        client.config,
        segments(client.row, 1),  # too few for a step
        client="twice",
        fence=Fence("inner", 1, 2, 99),
        last_merged_fence=before,
    )
    Round(order, ALONE, time.monotonic()).run(client.weights)
    assert client.state() == first
    client.round("merged")
    names = {path.name for path in inner_state_dir("inner", "twice").glob("*")}
    assert names == {"1-2-20.rank0of1.safetensors", "1-3-30.rank0of1.safetensors"}
