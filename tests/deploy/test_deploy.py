"""deploy/: every command is one of `pilot`'s, and ports, times and versions are those of the code."""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pilot import cli
from pilot.config import RunConfig
from pilot.fleet import up
from pilot.launch.node import UPLOAD_FACTOR, UPLOAD_MIN_S
from pilot.launch.notices import GOODBYE_S

from ..waiting import LIMIT_S, until

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
PORTS = [6379, 8000, 8001]  # Redis, SuperLink, pilot join
# An upload of two minutes is what all these files leave time for.
LEAVING_S = RunConfig().drain_deadline + max(UPLOAD_MIN_S, UPLOAD_FACTOR * 120) + GOODBYE_S


def yamls(name: str = "*.yaml") -> Iterator[tuple[Path, Any]]:
    for path in sorted(DEPLOY.rglob(name)):
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


def document(path: str) -> Any:
    (found,) = [found for where, found in yamls() if where == DEPLOY / path]
    return found


def kubernetes(kind: str, name: str) -> Any:
    return next(
        found
        for path, found in yamls()
        if path.parent.name == "kubernetes"
        and (found["kind"], found["metadata"]["name"] if "metadata" in found else "")
        == (kind, name)
    )


# -- commands ----------------------------------------------------------------------------------------

_COMMAND = re.compile(
    r"(?:^|\bexec\b.*?\s|uv run (?:--no-sync )?|\.venv/bin/)pilot ([a-z]+\b[^|<>;)`]*)"
)


def words(node: Any) -> Iterator[list[str]]:
    """Every list in a YAML document that is a command of `pilot`."""
    if isinstance(node, list) and node[:1] == ["pilot"]:
        yield [str(word) for word in node[1:]]
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from words(value)


def commands() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, tree in yamls():
        for argv in words(tree):
            found[f"{path.name}: {shlex.join(argv)}"] = argv
    for path in FILES:
        for line in path.read_text().splitlines():
            text = line.strip().removeprefix("#").strip().replace('"$@"', "")
            for tail in _COMMAND.findall(text if not text.startswith("`") else ""):
                argv = shlex.split(tail, comments=True)
                found[f"{path.name}: {shlex.join(argv)}"] = argv
    return found


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(choices)


def check(argv: list[str]) -> argparse.Namespace:
    """Parse a command as `pilot` does, and what it passes on to `pilot node` as that does."""
    name, known = argv[0], subcommands()
    assert name in known
    arguments, rest = cli._parser().parse_known_args(argv)
    if name == "join" and rest:
        _, rest = known["node"].parse_known_args(rest)
    assert not rest, f"{name} does not know {rest}"
    return arguments


def test_there_are_commands_to_check() -> None:
    names = {argv[0] for argv in commands().values()}
    assert {"up", "join", "token", "run"} <= names


@pytest.mark.parametrize("argv", commands().values(), ids=commands().keys())
def test_command_is_one_of_pilots(argv: list[str]) -> None:
    check(argv)


def test_no_token_is_on_a_command_line_or_in_a_file() -> None:
    for path in FILES:
        text = path.read_text()
        given = re.findall(r"--token[ =](\S+)", text) + re.findall(r"JOIN_TOKEN[:=] *(\S*)", text)
        assert set(given) <= {"-", "$(cat", "None"}, path


# -- ports, times, versions --------------------------------------------------------------------------


def test_ports_are_the_same_everywhere() -> None:
    head = kubernetes("StatefulSet", "pilot-head")["spec"]["template"]["spec"]["containers"][0]
    service = kubernetes("Service", "pilot-head")["spec"]["ports"]
    compose = document("docker/compose.yaml")["services"]["head"]
    assert sorted(port["containerPort"] for port in head["ports"]) == PORTS
    assert sorted(port["port"] for port in service) == PORTS
    assert sorted(map(int, compose["expose"])) == PORTS
    assert sorted([up.REDIS_PORT, up.SUPERLINK_PORT, up.JOIN_PORT]) == PORTS


def test_whoever_stops_a_site_waits_until_it_has_left() -> None:
    pod = kubernetes("StatefulSet", "pilot-site")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= LEAVING_S
    (hook,) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2:]
    assert hook.startswith("kill -TERM 1;") and "while kill -0 1" in hook
    for site in ("site-a", "site-b"):
        period = document("docker/compose.yaml")["services"][site]["stop_grace_period"]
        assert int(period.removesuffix("m")) * 60 >= LEAVING_S
    unit = (DEPLOY / "systemd" / "pilot-site@.service").read_text()
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)[0]) >= LEAVING_S
    assert "KillMode=mixed" in unit, "workers that get the signal, too, end without a reply"
    job = (DEPLOY / "slurm" / "site.sbatch").read_text()
    assert int(re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", job, re.M)[0]) >= LEAVING_S


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(
        pin.split(" ")[0].split("==") for pin in project["tool"]["uv"]["constraint-dependencies"]
    )
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    uv = re.findall(r"uv==([\d.]+)", dockerfile)
    uv += re.findall(r"uv==([\d.]+)", (DEPLOY / "skypilot" / "site.yaml").read_text())
    assert uv == [pins["uv"]] * 2
    python = re.findall(r"^FROM python:(\d+\.\d+)-", dockerfile, re.M)
    assert python == ["3.11"] and project["project"]["requires-python"].startswith(">=3.11,")
    (rust,) = re.findall(r"^FROM rust:1\.(\d+)-", dockerfile, re.M)
    assert int(rust) >= 88 and "cargo 1.88 or newer" in (ROOT / "README.md").read_text()


def test_images_are_those_that_the_dockerfile_makes() -> None:
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.M))
    for path in ("docker/compose.yaml", "docker/compose.cuda.yaml"):
        for service in document(path)["services"].values():
            name, target = service["image"].split(":")
            assert name == "pilot" and service["build"]["target"] == target in stages
    (image,) = document("kubernetes/kustomization.yaml")["images"]
    assert image["newTag"] in stages
    named = {
        container["image"]
        for _, found in yamls()
        if found.get("kind") == "StatefulSet"
        for container in found["spec"]["template"]["spec"]["containers"]
    }
    assert named == {image["name"]}
    assert not re.search(r"index-url|extra-index|https?://", dockerfile)


def test_containers_have_no_rights_that_they_do_not_need() -> None:
    assert (
        re.findall(r"^USER (\S+)$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.M)
        == ["1000:1000"] * 2
    )
    for name in ("pilot-head", "pilot-site"):
        pod = kubernetes("StatefulSet", name)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}


# -- scripts -----------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing() -> None:
    scripts = [DEPLOY / name for name in ("join.sh", "check.sh", "slurm/site.sbatch")]
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([program, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    for path in (DEPLOY / "systemd").glob("*.service"):
        unit = re.sub(r"/opt/pilot/\S*/(?:pilot|join\.sh)\b", "/bin/true", path.read_text())
        name = path.name.replace("@", "@a")
        (tmp_path / name).write_text(unit)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", tmp_path / name],
            capture_output=True,
            text=True,
        )
        ours = [line for line in done.stderr.splitlines() if name in line]
        assert ours == [] and done.returncode == 0, done.stderr


STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > "$LOG.argv"
printf '%s' "${PILOT_JOIN_TOKEN:-none}" > "$LOG.token"
trap 'echo drained >> "$LOG.end"; exit "${CODE:-0}"' TERM
echo started > "$LOG"
while [ -z "${ENDS:-}" ]; do sleep 0.05; done
exit "${CODE:-0}"
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with stand-ins for `pilot` and `scontrol`."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "pilot").write_text(STAND_IN)
    (programs / "scontrol").write_text('#!/bin/sh\necho "$@" > "$LOG.scontrol"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "deploy").symlink_to(DEPLOY)
    (tmp_path / "token").write_text("secret-1\n")
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "PILOT_HEAD": "head.example.org",
        "PILOT_JOIN_TOKEN_FILE": str(tmp_path / "token"),
    }


def said(machine: dict[str, str], what: str) -> str:
    path = Path(f"{machine['LOG']}.{what}")
    return path.read_text() if path.exists() else ""


def test_join_takes_the_token_from_a_file_into_the_environment(
    machine: dict[str, str],
) -> None:
    machine |= {"ENDS": "1", "PILOT_SITE": "site-a", "PILOT_WATCH": "aws"}
    command = ["sh", str(DEPLOY / "join.sh"), "--device-batch-size", "8"]
    subprocess.run(command, env=machine, check=True)
    assert said(machine, "token") == "secret-1" and "secret" not in said(machine, "argv")
    argv = said(machine, "argv").split()
    assert argv == [
        "join",
        "head.example.org",
        "--name",
        "site-a",
        "--watch",
        "aws",
        "--device-batch-size",
        "8",
    ]
    del machine["PILOT_WATCH"], machine["PILOT_JOIN_TOKEN_FILE"]
    subprocess.run(command, env=machine, check=True)
    assert said(machine, "token") == "none" and "--watch" not in said(machine, "argv")
    del machine["PILOT_HEAD"]
    done = subprocess.run(command, env=machine, capture_output=True, text=True)
    assert done.returncode == 2 and "set PILOT_HEAD" in done.stderr
    check(argv)


@pytest.mark.parametrize(
    ("ends", "code", "left_s", "again"),
    [
        ("signal", 0, 300, True),  # it has left, and is queued again
        ("signal", 1, 300, False),  # what it ended with is what the job ends with
        ("itself", 0, 3600, False),  # somebody stopped it
        ("itself", 0, 60, True),  # `--watch slurm` saw that its time was over
        ("itself", 2, 60, False),
    ],
)
def test_slurm_job_lets_its_site_leave_and_queues_itself_again(
    machine: dict[str, str], ends: str, code: int, left_s: int, again: bool
) -> None:
    machine |= {"SLURM_JOB_ID": "7", "CODE": str(code), "ENDS": "1" if ends == "itself" else ""}
    machine |= {"SLURM_JOB_END_TIME": str(int(time.time()) + left_s)}
    command = ["bash", str(DEPLOY / "slurm" / "site.sbatch")]
    job = subprocess.Popen(command, env=machine, cwd=Path(machine["LOG"]).parent)
    try:
        if ends == "signal":
            until(lambda: Path(machine["LOG"]).exists())
            job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=LIMIT_S) == code
    finally:
        job.kill()
        job.wait()
    assert said(machine, "end") == ("drained\n" if ends == "signal" else "")
    assert said(machine, "scontrol") == ("requeue 7\n" if again else "")
    assert "--watch\nslurm" in said(machine, "argv") and "slurm-7" in said(machine, "argv")
