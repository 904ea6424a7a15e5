"""A machine with a `pilot node` whose SuperNode is a script."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.wire.messages import Fence

from ...waiting import LIMIT_S, until

# It writes its arguments and its end to $FAKE_LOG, and fails at its first $FAKE_FAILS starts.
SUPERNODE = """#!{python}
import json, os, signal, sys, time
log = os.environ["FAKE_LOG"]
def tell(**values):
    with open(log, "a") as file:
        file.write(json.dumps(values) + "\\n")
def ends(*_):
    tell(ended=os.getpid(), leave=os.path.exists(os.environ["PILOT_NODE_DIR"] + "/leave"))
    sys.exit(0)
signal.signal(signal.SIGTERM, ends)
before = open(log).read().count("argv")
tell(argv=sys.argv[1:], pid=os.getpid(), preempt=os.environ.get("PILOT_PREEMPT_FILE"))
if before < int(os.environ.get("FAKE_FAILS", "0")):
    sys.exit(int(os.environ.get("FAKE_CODE", "1")))
while True:
    time.sleep(0.05)
"""
RUNNER = """
import os, sys
from pilot import cli
from pilot.launch import node
node.supernode.install = lambda directory: sys.argv[1]
node.FIRST_DELAY_S, node.BLIND_UPLOAD_S, node.MAX_RESTARTS = 0.05, 0.3, 3
node.LOST_S = 0.3
node.FROZEN_S = float(os.environ.get("FAKE_FROZEN_S", node.FROZEN_S))
sys.exit(cli.main(["node", "--name", "a", *sys.argv[2:]]))
"""


class Site:
    """A machine with a `pilot node`, whose SuperNode is a script."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = base / "nodes" / "a"
        self.log, self.program = base / "log", base / "supernode"
        self.log.touch()
        self.program.write_text(SUPERNODE.format(python=sys.executable))
        self.program.chmod(0o755)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.setenv("FAKE_LOG", str(self.log))
        self._monkeypatch = monkeypatch

    @contextmanager
    def node(self, *options: str, starts: bool = True) -> Iterator["subprocess.Popen[str]"]:
        command = [sys.executable, "-c", RUNNER, str(self.program), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            if starts:
                before = len(self.logged("argv"))
                until(lambda: len(self.logged("argv")) > before or process.poll() is not None)
            yield process
        finally:
            process.kill()
            process.communicate()

    def logged(self, key: str) -> list[Any]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line[key] for line in lines if key in line]

    def has_order(self, state: str, url: str = "", lease: int = 1, **values: Any) -> None:
        """A ClientApp in this process works on an order."""
        defaults: dict[str, Any] = {
            "run": "r",
            "redis_url": url,
            "client": "a",
            "fence": Fence("r", 1, 1, lease),
            "state": state,
            "pid": os.getpid(),
            "preempt_file": "",
            "drain_deadline_s": 20.0,
        }
        with self._monkeypatch.context() as patch:
            patch.setenv("PILOT_NODE_DIR", str(self.directory))
            in_flight.write(InFlight(**(defaults | values)))


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """(exit code, what it said) of a node that ends by itself."""
    said = process.communicate(timeout=LIMIT_S)[1]
    return process.returncode, said
