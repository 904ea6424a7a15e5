"""Submits the app that only echoes to a SuperLink: Flower's own floor for a round."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos.micro import as_toml
from benchmarks.chaos.processes import BIN, CONNECTION
from nanochat.errors import UserError

_PYPROJECT = """\
[project]
name = "echo"
version = "1.0.0"
description = "Sends bytes"
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "pilot"
fab-include = ["echo_app.py"]

[tool.flwr.app.components]
serverapp = "echo_app:server"
clientapp = "echo_app:client"

[tool.flwr.app.config]
clients = 2
rounds = 1
bytes-down = 0
bytes-up = 0
out = ""
"""


def echo(
    directory: Path,
    env: Mapping[str, str],
    *,
    clients: int,
    rounds: int,
    bytes_down: int,
    bytes_up: int,
    timeout_s: float,
) -> list[dict[str, Any]]:
    """Seconds of each round in which every client is sent `bytes_down` and sends `bytes_up`.

    `directory` must not exist; `env` names the SuperLink's connection. Raises UserError if Flower ends without
    a result.
    """
    app, out = directory / "app", directory / "echo.json"
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PYPROJECT, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("echo_app.py"), app)
    config = directory / "echo.toml"
    sizes = {"clients": clients, "rounds": rounds, "bytes-down": bytes_down, "bytes-up": bytes_up}
    config.write_text(as_toml({**sizes, "out": str(out)}), encoding="utf-8")
    command = [str(BIN / "flwr"), "run", str(app), CONNECTION, "--stream"]
    done = subprocess.run(
        [*command, "--run-config", str(config)],
        env=dict(env),
        timeout=timeout_s,
        capture_output=True,
        text=True,
    )
    if not out.exists():
        raise UserError(f"Flower's echo has no result: {(done.stdout + done.stderr)[-2000:]}")
    result: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return result
