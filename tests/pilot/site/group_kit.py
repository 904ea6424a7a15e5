"""ClientApps that use a resident group, under a process that is named as their SuperNode."""

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from pilot.wire.codec import decode, encode
from pilot.wire.frames import receive_frame, send_frame
from pilot.wire.messages import HelloOrder, TrainOrder, to_header

from ...waiting import LIMIT_S, family, gone, until
from ..worker_kit import ROOT, site_config

# A ClientApp, which lives for one message as Flower's do; `--parent-pid` names its SuperNode.
CLIENTAPP = """
import socket, sys
from pilot.site.handle import WorkerHandle
from pilot.wire.codec import decode, encode
from pilot.wire.frames import receive_frame, send_frame
test = socket.socket(fileno=int(sys.argv[1]))
header, parts = receive_frame(test)
with WorkerHandle(
    processes=header.get("processes", 1), device="cpu", idle_s=float(sys.argv[2]), name="c"
) as worker:
    print(worker._pid, worker._dir, flush=True)
    answer = worker.ask(header, parts)
send_frame(test, *answer)
"""


@dataclass
class ClientApp:
    """A ClientApp, running or done: which group it uses, and what that answered."""

    process: "subprocess.Popen[str]"
    connection: socket.socket
    pid: int = field(init=False)  # of the group's supervisor
    group_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        assert self.process.stdout is not None
        pid, group_dir = self.process.stdout.readline().split()
        self.pid, self.group_dir = int(pid), Path(group_dir)

    def answer(self) -> dict[str, Any]:
        return self.answer_and_update()[0]

    def answer_and_update(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        header, parts = receive_frame(self.connection)
        assert self.process.wait(LIMIT_S) == 0
        return header, decode(parts)


class SuperNode:
    """A process that does nothing and is named as the SuperNode of ClientApps."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(["sleep", "600"])
        self._directory, self._apps = directory, list[ClientApp]()

    def send(
        self,
        order: HelloOrder | TrainOrder,
        weights: dict[str, torch.Tensor] | None = None,
        *,
        idle_s: float = 600.0,
    ) -> ClientApp:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", CLIENTAPP, str(theirs.fileno()), str(idle_s)]
        with theirs:
            process = subprocess.Popen(
                [*command, "--parent-pid", str(self.process.pid)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PILOT_SCRATCH_DIR": str(self._directory)},
                pass_fds=[theirs.fileno()],
            )
        send_frame(ours, to_header(order), encode(weights or {}))
        self._apps.append(ClientApp(process, ours))
        return self._apps[-1]

    def close(self) -> None:
        for process in (self.process, *(app.process for app in self._apps)):
            process.kill()
            process.communicate()
        for app in self._apps:
            app.connection.close()
            with contextlib.suppress(psutil.NoSuchProcess):
                members = family(app.pid)
                until(lambda members=members: gone(members))  # type: ignore[misc]


def hello(site: Path) -> HelloOrder:
    return HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url="")
