"""A site with a key of its own, over TLS, that is killed: Flower refuses it for a while."""

import contextlib
import re
import signal
from pathlib import Path

import psutil
import pytest
import redis

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import CONNECTION, marked

from ..waiting import until
from .processes import (
    RUN_S,
    Deployment,
    events,
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


def supernode(site: str) -> psutil.Process:
    """The SuperNode of a site itself, not what keeps it or what it started."""
    (found,) = (
        p for p in marked(site) if Path([*p.cmdline(), "", ""][1]).name == "flower-supernode"
    )
    return found


def test_authenticated_node_that_was_killed_is_refused_for_a_while_and_then_trains_again(
    builtin: Path, tmp_path: Path, app: Path
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
    log = tmp_path / "site-a.log"
    with contextlib.ExitStack() as stack:
        deployment = stack.enter_context(Deployment(tmp_path, builtin, secure=True))
        keys = stack.enter_context(
            redis.Redis.from_url(deployment.env["PILOT_REDIS_URL"], decode_responses=True)
        )
        deployment.start_pilot_node("site-a", PYTHONPATH=str(hooks))
        run = stack.enter_context(
            killed_at_end(pilot_run(CONNECTION, config, env=deployment.env, app=app))
        )
        beat = "pilot:authenticated:client:site-a"
        until(lambda: int(keys.hget(beat, "tokens") or 0) > 0, RUN_S, "site-a to train")
        supernode(deployment.mark("site-a")).kill()
        output, _ = run.communicate(timeout=RUN_S)
        assert run.returncode == 0, output[-5000:]
        node = deployment.nodes["site-a"]
        node.send_signal(signal.SIGTERM)
        assert node.wait(60) == 0
        assert not marked(deployment.mark("site-a")), "nothing of it is left"
    said = log.read_text(encoding="utf-8")
    assert "[code: 2004]" in said, "it was never refused: the test shows nothing"
    ids = re.findall(r"SuperNode ID: (\d+)", said)
    assert len(ids) == 2 and ids[0] == ids[1], "it is known by its key"
    refused = events(builtin, "authenticated", "reply_refused")
    assert [event["client"] for event in refused] == ["site-a"]
    clients = [event["clients"] for event in events(builtin, "authenticated", "round_committed")]
    assert clients[0] == 0 and clients[-1] == 1
