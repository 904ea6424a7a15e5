"""`pilot superlink`: its SuperLink is back when it was killed, and what it starts has imported everything."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.processes import BIN, environment, listening, write_connection
from pilot.launch.flower_commands import FlowerCommands
from pilot.launch.flower_run import FlowerRun
from pilot.processes.scratch import free_port

from ...waiting import gone, until
from ..flower_app import write_app

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only"),
    pytest.mark.timeout(1800),
]

START_S = 600.0  # seconds on a machine of one's own

SERVER = """
import json, os, sys
from flwr.serverapp import ServerApp

report = {"ready": sorted({"torch", "redis", "flwr"} & sys.modules.keys())}
report["stale"] = sorted({name.partition(".")[0] for name in sys.modules} & {"pilot", "nanochat"})
app = ServerApp()

@app.main()
def main(grid, context):
    with open(context.run_config["report"] + ".part", "w") as file:
        json.dump(report | {"parent": os.getppid()}, file)
    os.rename(context.run_config["report"] + ".part", context.run_config["report"])
"""


class Service:
    """`pilot superlink` as a person starts it."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        write_connection(home / "flwr", self.port)
        self.env = environment(home, home, FLWR_HOME=str(home / "flwr"))
        self.log = home / "log"
        self.process = self.start("--port", str(self.port))
        until(lambda: listening(self.port), START_S, "the SuperLink")

    def start(self, *options: str) -> "subprocess.Popen[bytes]":
        command = [str(BIN / "pilot"), "superlink", "--insecure", *options]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def superlink(self) -> psutil.Process:
        (found,) = psutil.Process(self.process.pid).children()
        return found

    def everything(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("superlink"))
    try:
        yield service
    finally:
        service.process.kill()
        service.process.wait()


def test_a_servers_imports_are_there_before_it_is_and_the_runs_own_are_not(
    service: Service, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", port=service.port)
    (app / "tinyapp" / "server.py").write_text(SERVER)
    report, config = tmp_path / "report.json", tmp_path / "config.toml"
    config.write_text(f"report = {json.dumps(str(report))}\n")
    env = service.env | {"FLWR_HOME": str(app / ".flwr")}
    commands = FlowerCommands(app, env)
    run = FlowerRun("dep", app, commands)
    try:
        run.submit(config)
        lines: list[str] = []
        assert run.follow(lines.append).succeeded, lines
    finally:
        run.close()
        commands.close()
    found = json.loads(report.read_text())
    assert found["ready"] == ["flwr", "redis", "torch"] and found["stale"] == []
    assert found["parent"] in [process.pid for process in service.everything()]
    assert os.getpid() != found["parent"]


def test_a_superlink_that_is_killed_is_back_and_all_of_it_goes_with_the_command(
    service: Service,
) -> None:
    first = service.superlink()
    assert first.cmdline()[1:2] == ["flower-superlink"]
    below = service.everything()
    first.kill()
    until(lambda: gone(below))
    until(lambda: listening(service.port), START_S, "the SuperLink")
    assert service.superlink().pid != first.pid
    assert "starting it again" in service.log.read_text()
    assert service.start("--port", str(service.port)).wait(START_S) == 1, "the port is taken"
    until(lambda: len(service.everything()) >= 4)  # SuperLink, SuperExec, and a template of each
    below = service.everything()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(START_S) == 0
    until(lambda: gone(below))
    assert service.log.read_text().count("starting it again") == 1
