"""What a ClientApp holds in memory while it carries an order to its worker and a reply back.

python -m benchmarks.client_memory                                       # a small model
python -m benchmarks.client_memory --depth 9 --vocab-size 65536 --wire float32 int4

The ClientApp is the real one, in a process that has imported what a ClientApp of `pilot node` finds imported,
between Flower's functions for the pieces of messages (the order comes from a disk, the reply goes nowhere) and
a process on its Unix socket that takes an order and gives a reply of random bytes at once. `--plain`: the
order is put together as by a bare SuperNode, which Pilot's functions do not reach.

Lines are JSON, one for each form of replies: `peak_bytes` is the process's largest resident set (VmHWM),
`base_bytes` that before the order came; `order_bytes` and `reply_bytes` are those of tensors. Goal: 150 MB and
twice the larger of the two messages.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from nanochat.common import ArgumentParser, run_command_line
from nanochat.gpt import GPT
from pilot import plan
from pilot.config import RunConfig
from pilot.wire.codec import message_bytes
from pilot.wire.messages import Fence, Part, TrainOrder, to_header
from pilot.wire.records import to_records

_LIMIT_S = 900.0
_GOAL_BYTES = 150_000_000


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.client_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--wire", nargs="+", default=[RunConfig.wire_up], help="values of wire-up")
    parser.add_argument("--plain", action="store_true", help="as below a bare SuperNode")
    arguments = parser.parse_args()
    for wire in arguments.wire:
        print(json.dumps(_measure(arguments, wire)), flush=True)


def _measure(arguments: Namespace, wire: str) -> dict[str, Any]:
    config = RunConfig.from_mapping(
        {
            "run-name": "client-memory",
            "depth": arguments.depth,
            "vocab-size": arguments.vocab_size,
            "worker-idle": 0.0,
        }
    )
    shapes = _shapes(config)
    with tempfile.TemporaryDirectory() as directory:
        order_bytes = _write_order(config, shapes, Path(directory))
        sizes = {name: message_bytes([shape], wire=wire) for name, shape in shapes.items()}
        job = {"directory": directory, "sizes": sizes, "plain": arguments.plain}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.client_memory_child", json.dumps(job)],
            env=os.environ | {"NANOCHAT_BASE_DIR": directory},
            stdout=subprocess.PIPE,
            check=True,
            timeout=_LIMIT_S,
        )
    figures: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    reply_bytes = sum(sizes.values())
    allowed = _GOAL_BYTES + 2 * max(order_bytes, reply_bytes)
    sizes_said = {"order_bytes": order_bytes, "reply_bytes": reply_bytes, "goal_bytes": allowed}
    return {"wire_up": wire, "plain": arguments.plain} | figures | sizes_said


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = GPT(plan.model_config(config), compute_dtype=torch.float32)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_order(config: RunConfig, shapes: dict[str, tuple[int, ...]], directory: Path) -> int:
    """An order's objects, a file each, and a list of them; the bytes of its tensors."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    order = TrainOrder(
        fence=Fence(config.run_name, 1, 1, 1),
        client="site",
        config=config.to_mapping(),
        redis_url="",
        processes=1,
        segments=[],
        lease_is_tail=False,
        seconds_left=60.0,
        committed_tokens=0,
        total_tokens=1,
        step_rows=1,
        share=1.0,
        eval_first_row=0,
        eval_end_row=0,
    )
    parts = [
        Part(name, "float32", shape, os.urandom(message_bytes([shape])))
        for name, shape in shapes.items()
    ]
    message = Message(to_records(to_header(order), parts), 1, "train")
    objects = get_all_nested_objects(message)
    for object_id, one in objects.items():
        (directory / object_id).write_bytes(one.deflate())
    listed = {"root": message.object_id, "all": list(objects)}
    (directory / "listed.json").write_text(json.dumps(listed))
    return sum(len(part.data) for part in parts)


if __name__ == "__main__":
    run_command_line(main)
