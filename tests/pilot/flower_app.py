"""A Flower app of a few lines, for tests of what surrounds the real one."""

from pathlib import Path

PYPROJECT = """
[project]
name = "{name}"
version = "0.1.0"
description = "for tests"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "tests"
fab-include = ["tinyapp/**/*.py"]
[tool.flwr.app.components]
serverapp = "tinyapp.server:app"
clientapp = "tinyapp.client:app"
[tool.flwr.app.config]
mode = "ok"
lr = 0.5
report = ""
"""

CONNECTIONS = """
[superlink]
default = "sim"
[superlink.sim]
address = ":local:"
options.num-supernodes = 2
options.backend.client-resources.num-cpus = 1
[superlink.gpu]
address = ":local:"
options.num-supernodes = 2
options.backend.client-resources.num-gpus = 1
[superlink.dep]
address = "127.0.0.1:{port}"
insecure = true
"""

SERVER = """
import json, logging, os, subprocess, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    if config["mode"] == "raise":
        raise ValueError("server boom")
    report = {"pids": [os.getpid()], "scratch": os.environ.get("PILOT_SCRATCH_DIR"),
              "config": dict(config), "env": os.environ.get("PILOT_TEST"), "cwd": os.getcwd()}
    if config["mode"] == "wait":
        # what a worker group is: a session of its own
        report["pids"].append(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
        write(config, report)
        while True:
            time.sleep(0.2)
            list(grid.get_node_ids())
    if config["mode"] == "clients":
        while len(nodes := list(grid.get_node_ids())) < 2:
            time.sleep(0.2)
        content = RecordDict({"c": ConfigRecord({"x": 1})})
        for reply in grid.send_and_receive([Message(content, n, "train") for n in nodes]):
            report["pids"].append(int(reply.content["c"]["pid"]))
    print("client_0: loss=1.5 shard_progress=10%")
    print()
    print("done with lr", config["lr"])
    write(config, report)

def write(config, report):
    with open(config["report"] + ".part", "w") as file:
        json.dump(report, file)
    os.rename(config["report"] + ".part", config["report"])
"""

CLIENT = """
import os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    print("client", context.node_config["partition-id"], "was here")
    return Message(RecordDict({"c": ConfigRecord({"pid": os.getpid()})}), reply_to=message)
"""


def write_app(directory: Path, *, port: int, name: str = "tinyapp") -> Path:
    """The app in `directory`, its connections (`sim`, `gpu`, `dep` on `port`) in `.flwr`."""
    package = directory / "tinyapp"
    package.mkdir(parents=True)
    (directory / ".flwr").mkdir()
    (directory / "pyproject.toml").write_text(PYPROJECT.format(name=name))
    (directory / ".flwr" / "config.toml").write_text(CONNECTIONS.format(port=port))
    (package / "__init__.py").touch()
    (package / "server.py").write_text(SERVER)
    (package / "client.py").write_text(CLIENT)
    return directory
