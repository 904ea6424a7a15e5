"""What a ServerApp holds in memory, by the number of clients whose replies arrive at once.

python -m benchmarks.server_memory                                        # a small model, 2 and 4 clients
python -m benchmarks.server_memory --depth 8 --vocab-size 65536 --clients 2 4 16

The server's own code (round loop, mailbox, admission, commit, snapshot, results) leads two rounds in a process
of its own for each number of clients. In the place of the SuperLink stands a grid that calls Flower's functions
for the pieces of messages: what is sent goes nowhere, and replies come from a disk, all of them once the last
order of a round is out. Their tensors are random and the same for all clients.

Lines are JSON, one for each number of clients: `peak_bytes` is the process's largest resident set (VmHWM),
`base_bytes` that with everything imported and no model yet; each also over the parameters. `phases`: the peaks
while orders are sent, replies come, they are merged and written, and the results are written. Goal: 14 bytes
per parameter of 100 M with everything, and within 20 % from 2 to 16 clients.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from nanochat.common import ArgumentParser, run_command_line
from nanochat.gpt import GPT
from pilot import plan, server_app
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.processes.local_redis import LocalRedis
from pilot.rules.ledger import Ledger
from pilot.rules.rounds import MonotonicClock
from pilot.run.results import write_results
from pilot.run.state import RunState
from pilot.segment import first_rows
from pilot.server.mailbox import Mailbox
from pilot.server.report import Report
from pilot.server.round_loop import RoundLoop
from pilot.server.telemetry import Telemetry
from pilot.wire.code_hashes import code_hashes
from pilot.wire.codec import encode
from pilot.wire.messages import (
    HelloReply,
    TrainOrder,
    TrainReply,
    from_header,
    to_header,
)
from pilot.wire.records import from_records, to_arrays

http_grid = import_module("flwr.superlink.grid.http_grid")

_SHARD_ROWS, _ROW_TOKENS, _STEP_ROWS = 64, 8, 4
_UPDATE = 1e-4  # standard deviation of an update's values
_FINGERPRINTS = {"tokenizer": "t", "validation rows": "v", "validation shard": "0"}
_LIMIT_S = 1800.0


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.server_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--wire", default=RunConfig.wire_up, help="wire-up, the form of replies")
    parser.add_argument("--down", default=RunConfig.wire_down, help="wire-down, the form of orders")
    parser.add_argument("--child", type=Path, help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _lead(arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        _write_reply(_config(arguments, 1), Path(directory) / "objects")
        for clients in arguments.clients:
            print(json.dumps(_measure(arguments, clients, Path(directory))), flush=True)


def _config(arguments: Namespace, clients: int) -> RunConfig:
    return RunConfig.from_mapping(
        {
            "run-name": f"server-memory-{clients}",
            "depth": arguments.depth,
            "vocab-size": arguments.vocab_size,
            "sequence-len": _ROW_TOKENS,
            "total-batch-size": _ROW_TOKENS * _STEP_ROWS,
            "num-shards": 4 * clients,
            "min-clients": clients,
            "eval-rows": 2 * clients,
            "num-rounds": 2,
            "total-tokens": 10**6,
            "round-steps": 1,
            "round-min-duration": 1.0,
            "wire-up": arguments.wire,
            "wire-down": arguments.down,
            "snapshot-keep": 1,
            "max-update-norm-ratio": 0.0,  # random numbers that are longer than 1 step moves
            "wandb-mode": "disabled",
        }
    )


def _shapes(config: RunConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = GPT(plan.model_config(config), compute_dtype=torch.float32)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _random(config: RunConfig, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).mul_(scale)
        for name, shape in _shapes(config).items()
    }


def _write_reply(config: RunConfig, directory: Path) -> None:
    """The tensors of a reply as Flower's objects, a file each, and a list of them."""
    directory.mkdir()
    arrays = to_arrays(encode(_random(config, _UPDATE), wire=config.wire_up))
    objects = get_all_nested_objects(arrays)
    for object_id, one in objects.items():
        (directory / object_id).write_bytes(one.deflate())
    listed = {"root": arrays.object_id, "all": list(objects)}
    (directory / "listed.json").write_text(json.dumps(listed))


def _measure(arguments: Namespace, clients: int, directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.server_memory", "--child", str(directory)]
    command += ["--depth", str(arguments.depth), "--vocab-size", str(arguments.vocab_size)]
    command += ["--clients", str(clients), "--wire", arguments.wire, "--down", arguments.down]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(directory / f"base-{clients}")}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, timeout=_LIMIT_S
    )
    figures: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return figures


# -- the server's process ------------------------------------------------------------------------------


class Peaks:
    """The largest resident set since the last mark, in bytes, for each phase."""

    def __init__(self) -> None:
        self.base = _status("VmHWM")
        self.phases: dict[str, int] = {}
        self._phase = "start"
        self._reset()

    def enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self.phases[self._phase] = max(self.phases.get(self._phase, 0), _status("VmHWM"))
        self._phase = phase
        self._reset()

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is what is resident now


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


class HttpGrid:
    """Takes orders as Flower's grid of that name does, and has all replies to them once the last is out."""

    def __init__(self, clients: int, objects: Path, peaks: Peaks) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._nodes, self._objects, self._peaks = range(1, clients + 1), objects, peaks
        self._listed = json.loads((objects / "listed.json").read_text())
        self._sent: dict[str, tuple[Message, dict[str, Any]]] = {}  # without their tensors
        self._orders = self._taken = 0
        self._lock = threading.Lock()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at="at first") for node in self._nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        if message.metadata.message_type == "train":
            self._peaks.enter("orders")
        header, _ = from_records(message.content)
        # what Flower does, without the network
        message_id = f"{message.object_id}-{len(self._sent)}"
        inflatable_utils.push_objects(get_all_nested_objects(message), lambda *_: None)
        empty = Message(RecordDict(), message.metadata.dst_node_id, message.metadata.message_type)
        empty.metadata.__dict__["_message_id"] = message_id
        with self._lock:
            self._sent[message_id] = empty, header
            self._orders += message.metadata.message_type == "train"
        return [message_id]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        order, header = self._sent[message_id]
        content = RecordDict()
        if order.metadata.message_type != "train":
            reply: Any = HelloReply(
                shards=list(range(4 * len(self._nodes))),
                fingerprints=_FINGERPRINTS | code_hashes(),
            )
        else:
            if self._orders % len(self._nodes):
                return []
            reply = _trained(from_header(header))  # type: ignore[arg-type]
            if reply.consumed:
                self._peaks.enter("replies")
                content["parts"] = self._arrays()
            self._taken += bool(reply.consumed)
        name = f"client-{order.metadata.dst_node_id}"
        text = json.dumps(to_header(reply) | {"node_name": name})
        content["config"] = ConfigRecord({"header": text})
        content.setdefault("parts", to_arrays([]))
        return [Message(content, reply_to=order)]

    def _arrays(self) -> Any:
        contents = inflatable_utils.pull_objects(
            self._listed["all"], lambda object_id: (self._objects / object_id).read_bytes()
        )
        return http_grid.inflate_object_from_contents(self._listed["root"], contents)


def _trained(order: TrainOrder) -> TrainReply:
    """What a client says that has done its steps."""
    consumed = first_rows(order.segments, _STEP_ROWS, shard_rows=_SHARD_ROWS)
    tokens = sum(segment.rows or 0 for segment in consumed) * _ROW_TOKENS
    rows = order.eval_end_row - order.eval_first_row
    return TrainReply(
        fence=order.fence,
        client=order.client,
        steps=1,
        tokens=tokens,
        loss_nats=2.5 * tokens,
        eval_nats=1.5 * rows,
        eval_bytes=2 * rows,
        eval_rows=rows,
        consumed=consumed,
        row_counts={segment.shard: _SHARD_ROWS for segment in consumed},
        mirror=order.digest,
    )


class _Loop(RoundLoop):
    """Says when replies are no longer awaited."""

    peaks: Peaks

    def _commit(self, *values: Any) -> None:
        self.peaks.enter("merge")
        super()._commit(*values)
        self.peaks.enter("between")


def _lead(arguments: Namespace) -> None:
    """Lead the run of one number of clients; prints its figures."""
    (clients,), directory = arguments.clients, arguments.child
    config = _config(arguments, clients)
    with contextlib.suppress(AttributeError):  # of a version that has none
        vars(server_app)["transfer"].install()
    run_dir = Path(os.environ["NANOCHAT_BASE_DIR"]) / "runs" / config.run_name
    run_dir.mkdir(parents=True)
    with LocalRedis() as redis:
        peaks = Peaks()
        ledger = Ledger(
            num_shards=config.num_shards,
            epochs=1,
            shard_order=lambda _: range(config.num_shards),
        )
        state = RunState(config, _random(config, 0.02), ledger, total_tokens=config.total_tokens)
        parameters = sum(tensor.numel() for tensor in state.weights.values())
        began_s = time.monotonic()
        with _loop(
            config, state, HttpGrid(clients, directory / "objects", peaks), run_dir, redis.url
        ) as loop:
            loop.peaks = peaks
            loop.run()
        assert [record.clients for record in state.history] == [clients] * 2
        peaks.enter("results")
        write_results(state, run_dir)
        peaks.enter("end")
    peak = max(peaks.phases.values())
    print(
        json.dumps(
            {
                "clients": clients,
                "parameters": parameters,
                "wire_up": config.wire_up,
                "wire_down": config.wire_down,
                "peak_bytes": peak,
                "base_bytes": peaks.base,
                "bytes_per_parameter": round(peak / parameters, 2),
                "beyond_base_per_parameter": round((peak - peaks.base) / parameters, 2),
                "phases": {
                    name: round((most - peaks.base) / parameters, 2)
                    for name, most in peaks.phases.items()
                },
                "seconds": round(time.monotonic() - began_s, 1),
            }
        )
    )


@contextlib.contextmanager
def _loop(
    config: RunConfig, state: RunState, grid: HttpGrid, run_dir: Path, url: str
) -> Iterator[_Loop]:
    clock = MonotonicClock()
    coordinator = ServerCoordinator(url, config.run_name, term=1, run_dir=run_dir, clock=clock)
    with Telemetry(
        run_dir, config_dict={}, wandb_mode="disabled", wandb_project="", run_name=config.run_name
    ) as telemetry:
        try:
            yield _Loop(
                config,
                state,
                term=1,
                mailbox=Mailbox(grid, clock),  # type: ignore[arg-type]  # what Grid is used for
                coordinator=coordinator,
                report=Report(telemetry),
                clock=clock,
                run_dir=run_dir,
            )
        finally:
            coordinator.finish()


if __name__ == "__main__":
    run_command_line(main)
