"""The ClientApp of `benchmarks.client_memory`, for one message: a process that must not import torch."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from flwr.app import Message

from pilot.launch import warm
from pilot.wire.frames import receive_frame, send_frame
from pilot.wire.messages import Fence, Part, TrainReply, to_header


def _carry() -> None:
    """Be a ClientApp for one message; prints its figures."""
    job = json.loads(sys.argv[1])
    connection = _worker(job["sizes"])  # a fork, before there is anything to copy
    warm.preload()
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.task_identity import TaskIdentity

    from pilot import client_app

    class Handle:
        """The socket of a `WorkerHandle`, without the search for a group."""

        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> "Handle":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def drain(self) -> None:
            pass

        def ask(self, header: Any, parts: Any) -> Any:
            send_frame(connection, header, parts, drain=True)
            return receive_frame(connection)

    vars(client_app)["WorkerHandle"] = Handle
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    directory, base = Path(job["directory"]), _peak()
    listed = json.loads((directory / "listed.json").read_text())
    inflate: Any = inflatable_utils.inflate_object_from_contents
    if job["plain"]:
        inflate = inflate.__wrapped__
        vars(inflatable_utils)["inflate_object_from_contents"] = inflate
    # as Flower does: what is pulled, the app, and what is pushed
    message: Message = inflate(
        listed["root"],
        inflatable_utils.pull_objects(listed["all"], lambda i: (directory / i).read_bytes()),
    )
    message.metadata.__dict__["_message_id"] = listed["root"]
    received = _peak()
    content = client_app.answer(message.content, "site")
    reply = Message(content, reply_to=message)
    del content
    inflatable_utils.push_objects(get_all_nested_objects(reply), lambda *_: None)
    print(json.dumps({"peak_bytes": _peak(), "received_bytes": received, "base_bytes": base}))


def _worker(sizes: dict[str, int]) -> Any:
    """A process that takes one order and answers with parts of random bytes of these sizes; our end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    header, _ = receive_frame(theirs)
    reply = TrainReply(fence=Fence(**header["fence"]), client="site", tokens=8)
    parts = [Part(name, "int4", (1, size), os.urandom(size)) for name, size in sizes.items()]
    send_frame(theirs, to_header(reply), parts)
    os._exit(0)


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    _carry()
