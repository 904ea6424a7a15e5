"""Runs of one deployment over TLS, whose sites die, leave and are refused: real Flower, Redis and workers."""

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import BIN, CONNECTION, marked

from ..waiting import until
from .books import check_books
from .processes import (
    RUN_S,
    Deployment,
    events,
    finished,
    killed_at_end,
    pilot_run,
    write_config,
)

pytestmark = pytest.mark.timeout(1800)

# Flower's least interval: a node that was killed is refused for up to 20 s instead of up to 60 s
SHORT_WINDOW = """
import flwr.common.constant
flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL = 10
"""


@pytest.fixture(scope="module")
def deployment(
    prepared_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """One for all runs of this file. Only nodes whose key is registered are let in."""
    directory = tmp_path_factory.mktemp("deployment")
    with Deployment(directory, prepared_base, secure=True) as deployment:
        yield deployment


@pytest.fixture
def keys(deployment: Deployment) -> Iterator["redis.Redis"]:
    url = deployment.env["PILOT_REDIS_URL"]
    with redis.Redis.from_url(url, decode_responses=True) as client:
        yield client


def test_a_deployment_survives_the_death_of_a_site(
    builtin: Path, tmp_path: Path, app: Path, deployment: Deployment
) -> None:
    values = MICRO | {
        "run-name": "deployed",
        "total-tokens": 4 * 32768,
        "target-tokens": 32768,
        "num-rounds": 3,
        "grace-max": 15.0,
        "epochs": 4,
    }
    config = write_config(tmp_path, values)
    for name in ("site-a", "site-b"):
        deployment.start_node(name)
    # plain Flower, as users of the prototype know it; a mistyped value is named by the server
    run = [BIN / "flwr", "run", ".", "local-deployment", "--stream", "--run-config", config]
    with killed_at_end(
        subprocess.Popen(
            run,
            cwd=app,
            env=deployment.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    ) as process:
        until(lambda: len(opened(builtin)) == 2, RUN_S, "the second round")
        site = deployment.mark("site-b")
        until(lambda: workers(site), RUN_S, "a worker of site-b")
        deployment.nodes["site-b"].send_signal(signal.SIGKILL)
        until(lambda: not workers(site), what="the end of site-b's workers")
        output = finished(process)
    listed = subprocess.run(
        [BIN / "flwr", "ls", "local-deployment", "--format", "json"],
        cwd=app,
        env=deployment.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "finished:completed" in listed.stdout
    assert "configure_train: Training on all 2 Flower nodes" in output
    assert "s3cret" not in output
    assert (builtin / "runs" / "deployed" / "final_model.pt").exists()
    clients = [event["clients"] for event in events(builtin, "deployed", "round_committed")]
    assert clients == [2, 1, 1]
    refused = events(builtin, "deployed", "reply_refused")
    assert "site-b" in {event["client"] for event in refused}
    check_books(builtin, "deployed")


def opened(base: Path) -> list[dict[str, Any]]:
    return events(base, "deployed", "round_opened")


def workers(site: str) -> list[int]:
    """Worker processes of a site."""
    found = []
    for process in marked(site):
        with contextlib.suppress(Exception):
            if any("pilot.site" in argument for argument in process.cmdline()):
                found.append(process.pid)
    return found


def test_node_that_is_told_to_leave_in_mid_round_goes_when_the_server_has_its_reply(
    builtin: Path, tmp_path: Path, deployment: Deployment, keys: "redis.Redis"
) -> None:
    values = MICRO | {"run-name": "leaving", "total-tokens": 10**8, "num-rounds": 1, "epochs": 9}
    config = write_config(
        tmp_path, values | {"round-min-duration": 300.0, "round-max-duration": 300.0}
    )
    deployment.start_node_unless_there("site-a")
    deployment.start_pilot_node("site-c")
    with killed_at_end(pilot_run(CONNECTION, config, env=deployment.env)) as process:

        def trains(name: str) -> bool:
            return int(keys.hget(f"pilot:leaving:client:{name}", "tokens") or 0) > 0

        until(lambda: trains("site-a") and trains("site-c"), RUN_S, "both to train")
        # one leaves by a signal to its node
        node = deployment.nodes["site-c"]
        node.send_signal(signal.SIGTERM)
        assert node.wait(120) == 0
        assert not marked(deployment.mark("site-c")), "nothing of it is left"
        said = (deployment.directory / "site-c.log").read_text(encoding="utf-8")
        assert "leaving: the server has our last reply on disk" in said
        # the other by a key that an operator sets; it is back when that is gone
        keys.set("pilot:leaving:stop:site-a", "maintenance", ex=600)
        until(lambda: len(events(builtin, "leaving", "reply")) == 2, RUN_S, "both replies")
        keys.delete("pilot:leaving:stop:site-a")
        finished(process)
    replies = {event["client"]: event for event in events(builtin, "leaving", "reply")[:2]}
    assert replies["site-a"]["stopped_by"] == "maintenance"
    assert replies["site-c"]["stopped_by"] in ("its node ends", "pilot node: SIGTERM")
    assert all(event["tokens"] > 0 for event in replies.values())
    (committed,) = events(builtin, "leaving", "round_committed")
    assert committed["clients"] == 2
    assert committed["tokens"] == sum(event["tokens"] for event in replies.values())
    assert events(builtin, "leaving", "reply_refused") == []


def test_a_run_that_an_operator_stops_has_its_open_round_merged_and_is_reported_as_stopped(
    builtin: Path, tmp_path: Path, deployment: Deployment, keys: "redis.Redis"
) -> None:
    values = MICRO | {"run-name": "stopped", "total-tokens": 10**8, "min-clients": 1, "epochs": 9}
    config = write_config(
        tmp_path, values | {"round-min-duration": 300.0, "round-max-duration": 300.0}
    )
    deployment.start_node_unless_there("site-a")
    with killed_at_end(pilot_run(CONNECTION, config, env=deployment.env)) as process:
        beat = "pilot:stopped:client:site-a"
        until(lambda: int(keys.hget(beat, "tokens") or 0) > 0, RUN_S, "site-a to train")
        stop = [BIN / "pilot", "stop", "stopped", "--reason", "dear power"]
        said = subprocess.run(stop, env=deployment.env, capture_output=True, text=True, check=True)
        assert "Run stopped was stopped; the same command resumes it" in said.stdout
        output, _ = process.communicate(timeout=RUN_S)
    assert process.returncode == 1, output[-3000:]
    last = output.splitlines()[-1]
    assert last == "error: the run was stopped (dear power); the same command resumes it"
    assert "s3cret" not in output + said.stdout + said.stderr
    (committed,) = events(builtin, "stopped", "round_committed")
    assert (committed["reason"], committed["clients"]) == ("stopped", 1) and committed["tokens"] > 0
    check_books(builtin, "stopped")


def supernode(site: str) -> psutil.Process:
    """The SuperNode of a site itself, not what keeps it or what it started."""
    (found,) = (
        p for p in marked(site) if Path([*p.cmdline(), "", ""][1]).name == "flower-supernode"
    )
    return found


def test_authenticated_node_that_was_killed_is_refused_for_a_while_and_then_trains_again(
    builtin: Path, tmp_path: Path, deployment: Deployment, keys: "redis.Redis"
) -> None:
    values = MICRO | {
        "run-name": "authenticated",
        "total-tokens": 65536,
        "target-tokens": 65536,
        "min-clients": 1,
    }
    config = write_config(tmp_path, values)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(SHORT_WINDOW)
    deployment.end("site-a")
    deployment.start_pilot_node("site-d", PYTHONPATH=str(hooks))
    with killed_at_end(pilot_run(CONNECTION, config, env=deployment.env)) as run:
        beat = "pilot:authenticated:client:site-d"
        until(lambda: int(keys.hget(beat, "tokens") or 0) > 0, RUN_S, "site-d to train")
        supernode(deployment.mark("site-d")).kill()
        finished(run)
        node = deployment.nodes["site-d"]
        node.send_signal(signal.SIGTERM)
        assert node.wait(60) == 0
        assert not marked(deployment.mark("site-d")), "nothing of it is left"
    said = (deployment.directory / "site-d.log").read_text(encoding="utf-8")
    assert "[code: 2004]" in said, "it was never refused: the test shows nothing"
    ids = re.findall(r"SuperNode ID: (\d+)", said)
    assert len(ids) == 2 and ids[0] == ids[1], "it is known by its key"
    refused = events(builtin, "authenticated", "reply_refused")
    assert [event["client"] for event in refused] == ["site-d"]
    clients = [event["clients"] for event in events(builtin, "authenticated", "round_committed")]
    assert clients[0] == 0 and clients[-1] == 1
