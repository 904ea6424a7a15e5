"""`pilot run`: mistakes are named, the exit code is true, and nothing survives a run."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pilot import cli
from pilot.commands.run import Console
from pilot.errors import PilotError
from pilot.launch import connection
from pilot.launch import superlink as superlink_module
from pilot.launch.connection import Connection, flower_environment, flower_program
from pilot.processes.scratch import free_port

from ..waiting import until
from .flower_app import write_app

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def superlink() -> Iterator[int]:
    """The port of a deployment's SuperLink (no SuperNodes: the app's server works alone)."""
    port = free_port()
    command = [flower_program("flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    env = {**flower_environment(), "FLWR_TELEMETRY_ENABLED": "0"}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    there = Connection("dep", {"address": f"127.0.0.1:{port}"}, Path())
    try:
        until(lambda: reachable(there), 300)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_app(tmp_path, monkeypatch, port=free_port())


@pytest.fixture
def deployed_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, superlink: int) -> Path:
    return make_app(tmp_path, monkeypatch, port=superlink)


def make_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, port: int) -> Path:
    monkeypatch.delenv("FLWR_HOME")
    directory = write_app(tmp_path / "app", port=port)
    monkeypatch.chdir(directory)
    return directory


def reachable(there: Connection) -> bool:
    try:
        connection.check_reachable(there)
    except PilotError:
        return False
    return True


def start(*arguments: str, **env: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "pilot.cli", "run", *arguments],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, list[str], str]:
    out, err = process.communicate()
    return process.returncode, out.splitlines(), err


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_gone(report: dict[str, Any]) -> bool:
    alive = [pid for pid in report["pids"] if running(pid)]
    return not alive and not (report["scratch"] and Path(report["scratch"]).exists())


# --- mistakes, before anything starts


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which `pilot run` refuses."""
    assert cli.main(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_an_unknown_connection_is_refused_with_the_known_ones(
    app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refusal(capsys, "simulation")
    assert '"simulation"' in sentence
    assert "dep, gpu, sim" in sentence


def test_a_missing_project_or_configuration_is_named(
    tmp_path: Path, app: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "pyproject.toml" in refusal(capsys, "sim", "--app", str(tmp_path))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "nowhere"))
    assert "nowhere/config.toml" in refusal(capsys, "sim")
    (app / ".flwr" / "config.toml").write_text("[broken")
    monkeypatch.delenv("FLWR_HOME")
    assert "cannot read" in refusal(capsys, "sim")


def test_gpus_that_are_not_there_are_said(
    app: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "asks for 2 GPUs" in (sentence := refusal(capsys, "gpu"))
    assert "this machine has no GPU" in sentence
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: A'\necho 'GPU 1: B'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert connection.count_gpus() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "this machine has 1 GPU:" in refusal(capsys, "gpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert connection.count_gpus() == 2
    connection.check_resources(connection.read_connection("gpu", app / ".flwr"), 2)
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: A'\n" + "echo '  MIG 3g.40gb Device 0: (UUID: MIG-1)'\n" * 2
    )
    assert connection.count_gpus() == 1, "nobody hands out slices that are not named"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert connection.count_gpus() == 2


def test_run_config_of_pilot_is_checked_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLWR_HOME")
    app = write_app(tmp_path / "pilot", port=free_port(), name="pilot")
    assert "mode" in refusal(capsys, "sim", "--app", str(app))  # no key of Pilot's, in the defaults
    pyproject = app / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('mode = "ok"\nlr = 0.5\nreport = ""\n', ""))
    assert "leraning" in refusal(capsys, "sim", "--app", str(app), "--run-config", "leraning=1")
    assert "lr" in refusal(capsys, "sim", "--app", str(app), "--run-config", 'lr="abc"')
    assert "absent.toml" in refusal(capsys, "sim", "--app", str(app), "--run-config", "absent.toml")


def test_an_unreachable_superlink_is_one_sentence(
    app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refusal(capsys, "dep")
    assert "no SuperLink answers at 127.0.0.1:" in sentence
    assert "`pilot up`" in sentence


def test_help_names_the_exit_codes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    out = capsys.readouterr().out
    assert "pilot run local-simulation --run-config configs/tiny.toml" in out
    assert "130" in out


# --- the pieces


def test_merged_values_survive_the_file_that_flower_reads(tmp_path: Path) -> None:
    values = {
        "run-name": 'a "quoted" \\ näme \x7f\t',
        "lr": 5e-05,
        "nan": float("inf"),
        "rounds": 3,
        "on": True,
        "t": {"odd key": {"x": 1}},
    }
    connection.write_toml(tmp_path / "c.toml", values)
    assert tomllib.loads((tmp_path / "c.toml").read_text()) == values


def test_on_a_terminal_each_client_has_one_line_that_is_updated() -> None:
    inner, outer = pty.openpty()
    with os.fdopen(outer, "w") as terminal:
        console = Console(terminal)
        for line in (
            "[ROUND 1]",
            "client_0: loss=2.5 shard_progress=1%",
            "client_1: loss=2.4 shard_progress=1%",
            "round=1 val_bpb=2.0",
            "client_0: loss=1.5 shard_progress=2%",
        ):
            console.show(line)
        console.close()
    text = read_all(inner)
    shown = text.replace("\r\n", "\n")
    assert "[ROUND 1]\n" in shown
    assert "round=1 val_bpb=2.0\n" in shown
    # what is written over is not left standing on a line of its own
    assert shown.split("\n")[-1].count("client_0") <= 1
    assert "\x1b[A" in text
    assert re.search(r"client_0: loss=2.5 shard_progress=1%.*\r.*client_0: loss=1.5", shown, re.S)


def read_all(terminal: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed."""
    parts = []
    with contextlib.suppress(OSError):  # Linux ends it with EIO
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_a_superlink_that_does_not_start_says_its_last_words(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "flower-superlink"
    program.write_text("#!/bin/sh\necho '[Errno 98] error while binding'\necho bye\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(superlink_module, "flower_program", lambda name: str(tmp_path / name))
    monkeypatch.setattr(superlink_module, "_scratch_directory", lambda: scratch)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert cli.main(["run", "sim"]) == 2
    assert "did not start: [Errno 98] error while binding" in capsys.readouterr().err
    assert not scratch.exists()


# --- whole runs


def test_a_simulation_needs_nothing_and_leaves_nothing(app: Path, tmp_path: Path) -> None:
    report_path = tmp_path / "report.json"
    (app / "over.toml").write_text("lr = 0.25\nmode = 'raise'\n")
    (app / ".gitignore").write_text("__pycache__/\n.flwr/*\n!.flwr/config.toml\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(app)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "app"]):
        subprocess.run([*git, *command], check=True)

    config = ("over.toml", f'mode="clients" report="{report_path}"')
    code, lines, err = finish(start("sim", "--run-config", *config, PILOT_TEST="seen"))

    assert code == 0, (lines, err)
    assert "client_0: loss=1.5 shard_progress=10%" in lines
    assert lines[lines.index("done with lr 0.25") - 1] == ""
    assert sum("was here" in line for line in lines) == 2
    assert not [line for line in lines if "deprecated" in line or "\x1b" in line]
    report = json.loads(report_path.read_text())
    assert report["env"] == "seen"
    assert report["cwd"] == str(app)
    assert len(report["pids"]) == 3
    assert all_gone(report)
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True)
    assert status.stdout == b""


def test_nothing_survives_the_interrupt_of_pilot_run(app: Path, tmp_path: Path) -> None:
    """Nor SIGKILL: tests/federation/test_runs.py."""
    report_path = tmp_path / "report.json"
    process = start("sim", "--run-config", f'mode="wait" report="{report_path}"')
    try:
        until(report_path.exists, 300)
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 130
        until(lambda: all_gone(json.loads(report_path.read_text())))
    finally:
        process.kill()


def test_a_killed_server_fails_the_run_at_once(app: Path, tmp_path: Path) -> None:
    report_path = tmp_path / "report.json"
    process = start("sim", "--run-config", f'mode="wait" report="{report_path}"')
    try:
        until(report_path.exists, 300)
        report = json.loads(report_path.read_text())
        os.kill(report["pids"][0], signal.SIGKILL)
        code, _, err = finish(process)
    finally:
        process.kill()
    assert code == 1
    assert "the server's process was killed" in err
    assert all_gone(report)


def test_a_deployed_run_ends_with_the_servers_own_outcome(
    deployed_app: Path, tmp_path: Path
) -> None:
    report_path = tmp_path / "report.json"
    good = start("dep", "--run-config", f'report="{report_path}"')
    bad = start("dep", "--run-config", 'mode="raise"')
    code, lines, err = finish(good)
    assert code == 0, (lines, err)
    assert "done with lr 0.5" in lines
    code, lines, err = finish(bad)
    assert code == 1
    assert "server boom" in err
    assert err.startswith("error: the run failed")


def test_sigterm_stops_a_deployed_run(deployed_app: Path, tmp_path: Path) -> None:
    report_path = tmp_path / "report.json"
    process = start("dep", "--run-config", f'mode="wait" report="{report_path}"')
    try:
        until(report_path.exists, 300)
        process.terminate()
        code, lines, _ = finish(process)
    finally:
        process.kill()
    server, child = json.loads(report_path.read_text())["pids"]
    os.kill(child, signal.SIGKILL)  # the app's own business in a deployment
    assert code == 143
    assert "Stopping the run" in lines
    until(lambda: not running(server))
