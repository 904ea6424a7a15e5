"""Sites that leave in mid-round, over real Flower, Redis and workers: what they trained is not lost."""

import contextlib
import signal
from pathlib import Path

import pytest
import redis

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import marked

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


def test_node_that_is_told_to_leave_in_mid_round_goes_when_the_server_has_its_reply(
    builtin: Path, tmp_path: Path, app: Path
) -> None:
    values = MICRO | {"run-name": "leaving", "total-tokens": 10**8, "num-rounds": 1, "epochs": 9}
    config = write_config(
        tmp_path, values | {"round-min-duration": 300.0, "round-max-duration": 300.0}
    )
    with contextlib.ExitStack() as stack:
        deployment = stack.enter_context(Deployment(tmp_path, builtin))
        keys = stack.enter_context(
            redis.Redis.from_url(deployment.env["PILOT_REDIS_URL"], decode_responses=True)
        )
        for name in ("site-a", "site-b"):
            deployment.start_pilot_node(name)
        process = stack.enter_context(
            killed_at_end(pilot_run("local-deployment", config, env=deployment.env, app=app))
        )

        def trains(name: str) -> bool:
            return int(keys.hget(f"pilot:leaving:client:{name}", "tokens") or 0) > 0

        until(lambda: trains("site-a") and trains("site-b"), RUN_S, "both to train")
        # one leaves by a signal to its node
        node = deployment.nodes["site-b"]
        node.send_signal(signal.SIGTERM)
        assert node.wait(120) == 0
        assert not marked(deployment.mark("site-b")), "nothing of it is left"
        said = (tmp_path / "site-b.log").read_text(encoding="utf-8")
        assert "leaving: the server has our last reply on disk" in said
        # the other by a key that an operator sets; it is back when that is gone
        keys.set("pilot:leaving:stop:site-a", "maintenance", ex=600)
        until(lambda: len(events(builtin, "leaving", "reply")) == 2, RUN_S, "both replies")
        keys.delete("pilot:leaving:stop:site-a")
        output, _ = process.communicate(timeout=RUN_S)
        assert process.returncode == 0, output[-5000:]
    replies = {event["client"]: event for event in events(builtin, "leaving", "reply")[:2]}
    assert replies["site-a"]["stopped_by"] == "maintenance"
    assert replies["site-b"]["stopped_by"] in ("its node ends", "pilot node: SIGTERM")
    assert all(event["tokens"] > 0 for event in replies.values())
    (committed,) = events(builtin, "leaving", "round_committed")
    assert committed["clients"] == 2
    assert committed["tokens"] == sum(event["tokens"] for event in replies.values())
    assert events(builtin, "leaving", "reply_refused") == []
