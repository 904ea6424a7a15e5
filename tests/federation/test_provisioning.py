"""The sun moves from west to south: a real federation whose clients a provisioner starts and drains."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import BIN, CONNECTION, MARK, ROOT, marked
from pilot.run.events import read_events

from ..waiting import gone, until
from .books import check_books
from .processes import RUN_S, Deployment, events, finished, killed_at_end, pilot_run, write_config

pytestmark = pytest.mark.timeout(1800)

RUN = "following-the-sun"
PROVISION = """
run = "{run}"
every = 0.2

[limits]
max-clients = 2

[signals.west]
kind = "file"
file = "west"
unit = "g/kWh"
[signals.south]
kind = "file"
file = "south"
unit = "g/kWh"
[signals.coal]
kind = "trace"
file = "coal.csv"
unit = "g/kWh"

[defaults]
start-below = 100.0
hold = 0.0
start = ["pilot", "node", "--name", "{{client}}", "--insecure", "--superlink", "127.0.0.1:{port}"]
idle-w = 100.0
training-w = 1000.0

[clients.west]
signal = "west"
carbon = "west"
[clients.south]
signal = "south"
carbon = "south"
[clients.east]
signal = "coal"
carbon = "coal"
"""


@pytest.fixture
def deployment(builtin: Path, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path, builtin) as deployment:
        yield deployment


@contextmanager
def provisioner(deployment: Deployment, config: Path) -> Iterator["subprocess.Popen[str]"]:
    env = deployment.env | {MARK: str(deployment.directory)}
    process = subprocess.Popen(
        [str(BIN / "pilot"), "provision", str(config)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with killed_at_end(process):
        yield process


def told(base: Path, client: str) -> list[str]:
    """What the provisioner has done with `client` so far."""
    own = base / "provision" / RUN / "events.jsonl"
    found = [*read_events(own), *read_events(base / "runs" / RUN / "events.jsonl")]
    return [e["action"] for e in found if e["event"] == "provision" and e["client"] == client]


def nodes(deployment: Deployment) -> dict[str, psutil.Process]:
    """The running `pilot node` of each client, by its name."""
    found = {}
    for process in marked(str(deployment.directory)):
        words = process.cmdline()
        if "node" in words and "--name" in words:
            name = words[words.index("--name") + 1]
            assert name not in found, f"{name} was started twice"
            found[name] = process
    return found


def test_clients_start_and_drain_by_the_signal_and_nothing_is_lost(
    builtin: Path, tmp_path: Path, deployment: Deployment
) -> None:
    text = PROVISION.format(run=RUN, port=deployment.port)
    (tmp_path / "provision.toml").write_text(text)
    (tmp_path / "coal.csv").write_text("0,700\n86400,700\n")
    (tmp_path / "west").write_text("50")
    (tmp_path / "south").write_text("300")
    values = MICRO | {"run-name": RUN, "num-rounds": 5, "target-tokens": 8192, "epochs": 4}
    values |= {"min-clients": 1, "quorum": 1, "total-tokens": 10**7}
    values |= {"clients-timeout": RUN_S}
    config = tmp_path / "provision.toml"
    try:
        with killed_at_end(
            pilot_run(CONNECTION, write_config(tmp_path, values), env=deployment.env)
        ) as run:
            with provisioner(deployment, config) as first:
                until(lambda: "up" in told(builtin, "west"), RUN_S, "west")
                west = nodes(deployment)["west"]
                until(lambda: events(builtin, RUN, "round_committed"), RUN_S, "a round of west's")
                first.send_signal(signal.SIGKILL)
            (tmp_path / "west").write_text("300")
            (tmp_path / "south").write_text("50")
            with provisioner(deployment, config) as second:
                until(lambda: "down" in told(builtin, "west"), RUN_S, "west's end")
                assert gone([west])
                finished(run)
                said = finished(second)
        assert nodes(deployment) == {}, "the run is over, and nobody pays for a machine"
    finally:
        for process in marked(str(deployment.directory)):
            process.kill()
    assert told(builtin, "west") == ["start", "up", "drain", "stop", "down"]
    assert told(builtin, "south") == ["start", "up", "drain", "stop", "down"]
    assert told(builtin, "east") == []
    assert "south: start (50 g/kWh, below 100" in said and "the run is finished" in said
    replies = events(builtin, RUN, "reply")
    assert {reply["client"] for reply in replies} == {"west", "south"}
    assert not events(builtin, RUN, "reply_refused")
    check_books(builtin, RUN)
    check_energy(builtin, replies)


def check_energy(base: Path, replies: list[dict[str, Any]]) -> None:
    """Each client's tokens are those of its replies, and its grams those of its signal while it was on."""
    energy = events(base, RUN, "energy")
    for name in ("west", "south"):
        mine = [event for event in energy if event["client"] == name]
        tokens = sum(reply["tokens"] for reply in replies if reply["client"] == name)
        assert sum(event["tokens"] for event in mine) == tokens > 0
        kwh, grams = sum(e["kwh"] for e in mine), sum(e["grams"] for e in mine)
        on_s, busy_s = sum(e["on_s"] for e in mine), sum(e["training_s"] for e in mine)
        assert kwh * 3600 == pytest.approx(0.9 * busy_s + 0.1 * on_s) and on_s > busy_s
        assert 49.999 * kwh < grams < 300.001 * kwh  # the events are rounded
    assert not [event for event in energy if event["client"] == "east"]
