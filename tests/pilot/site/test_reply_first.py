"""A group replies first and writes its inner state afterwards; what a crash in between costs."""

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch

from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.site.inner_state import inner_state_dir
from pilot.wire.messages import Fence, TrainOrder

from ...waiting import family, gone, until
from ..worker_kit import ENDLESS, first_weights, site_config, train_order
from .group_kit import ClientApp, SuperNode

# Ranks that hold back the inner optimizer's state until a file appears
HELD_BACK = """
import os, time
from pathlib import Path
if "PILOT_RANK" in os.environ:
    from pilot.site import inner_state
    save = inner_state.save_file
    def held_back(*given):
        while not Path(os.environ["STATE_MAY_BE_WRITTEN"]).exists():
            time.sleep(0.01)
        save(*given)
    inner_state.save_file = held_back
"""


@dataclass
class HeldBack:
    """A client with two ranks that trains until `notice` appears; `written` lets it write its state."""

    supernode: SuperNode
    leader: ServerCoordinator
    order: TrainOrder
    weights: dict[str, torch.Tensor]
    notice: Path
    written: Path

    @property
    def states(self) -> list[str]:
        directory = inner_state_dir("r", self.order.client)
        return sorted(path.name for path in directory.glob("*")) if directory.exists() else []

    def leaves(self) -> ClientApp:
        """The ClientApp of a client that was told to leave in its round and has replied."""
        app = self.supernode.send(self.order, self.weights)
        names = [self.order.client]
        until(lambda: any(h.heartbeat.tokens for h in self.leader.heartbeats(names).values()))
        self.notice.touch()
        reply, update = app.answer_and_update()
        assert reply["stopped_by"] == f"preempt-file {self.notice}" and not reply.get("error")
        assert reply["tokens"] > 0 and update and self.states == [], "the reply came first"
        return app


@pytest.fixture
def held_back(
    supernode: SuperNode,
    site: Path,
    redis_url: str,
    leader: ServerCoordinator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> HeldBack:
    (tmp_path / "sitecustomize.py").write_text(HELD_BACK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    written, notice = tmp_path / "may-be-written", tmp_path / "notice"
    monkeypatch.setenv("STATE_MAY_BE_WRITTEN", str(written))
    config = site_config(site, round_steps=0, preempt_file=str(notice), drain_deadline=60.0)
    order = train_order(config, ENDLESS, processes=2, redis_url=redis_url, client=tmp_path.name)
    return HeldBack(supernode, leader, order, first_weights(config), notice, written)


def test_client_that_is_leaving_replies_first_and_writes_its_inner_state_afterwards(
    held_back: HeldBack,
) -> None:
    app = held_back.leaves()
    members = family(app.pid)
    assert len(members) == 3, "its ranks are still there: they have something to write"
    held_back.written.touch()
    until(lambda: gone(members))
    assert held_back.states == ["1-1-1.rank0of2.safetensors", "1-1-1.rank1of2.safetensors"]


def test_crash_before_the_state_is_written_costs_the_state_and_not_the_next_round(
    held_back: HeldBack,
) -> None:
    app = held_back.leaves()
    members = family(app.pid)
    psutil.Process(app.pid).kill()
    until(lambda: gone(members))
    assert held_back.states == []
    held_back.notice.unlink()
    held_back.written.touch()
    order = held_back.order
    config = RunConfig.from_mapping({**order.config, "round-steps": 1})
    again = replace(
        order,
        config=config.to_mapping(),
        fence=Fence("r", 1, 2, 2),
        last_merged_fence=order.fence,
        redis_url="",
    )
    reply = held_back.supernode.send(again, held_back.weights).answer()
    assert (reply["steps"], reply.get("error", "")) == (1, "")
    states = ["1-2-2.rank0of2.safetensors", "1-2-2.rank1of2.safetensors"]
    until(lambda: held_back.states == states)
