"""Starting, finding and ending real processes; tests/federation uses it, too."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil

from pilot.launch.bundle import stage
from pilot.processes.ancestry import alive

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CONNECTION = "local-deployment"
MARK = "PILOT_TEST_SITE"  # in the environment of every process that a site starts


def listening(port: int) -> bool:
    """Whether a process accepts connections at 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment(base: Path, home: Path, **more: str) -> dict[str, str]:
    """The environment of a newcomer's shell, with the directories of the test."""
    return {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        # the Rust toolchain is the machine's, in whatever home directory it is installed
        "CARGO_HOME": os.environ.get("CARGO_HOME", str(Path.home() / ".cargo")),
        "RUSTUP_HOME": os.environ.get("RUSTUP_HOME", str(Path.home() / ".rustup")),
        "NANOCHAT_BASE_DIR": str(base),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # or other tests' processes leave a simulation hardly any time
        **more,
    }


def copy_app(directory: Path) -> Path:
    """The Flower app alone with its connections, below `directory`, for `flwr run` (which would look at every
    file of a checkout and its .venv)."""
    directory.mkdir(parents=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    app = stage(ROOT, project, directory)
    shutil.copytree(ROOT / ".flwr", app / ".flwr")
    return app


def write_connection(flower_home: Path, port: int, certificates: Path | None = None) -> None:
    """Flower's configuration with one connection, CONNECTION; with TLS if there are root `certificates`."""
    flower_home.mkdir(parents=True)
    security = f'root-certificates = "{certificates}"' if certificates else "insecure = true"
    text = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n{security}\n'
    (flower_home / "config.toml").write_text(text, encoding="utf-8")


def marked(value: str) -> list[psutil.Process]:
    """Running processes that have MARK=value in their environment."""
    return [process for process in _living() if _mark(process) == value]


def marked_below(prefix: str) -> list[psutil.Process]:
    """Running processes whose MARK begins with `prefix`."""
    return [process for process in _living() if _mark(process).startswith(prefix)]


def _living() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        if alive(process):
            yield process


def _mark(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        return str(process.environ().get(MARK, ""))
    return ""


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()
