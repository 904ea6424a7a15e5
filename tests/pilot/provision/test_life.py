"""A client's life, step by step, with a Redis of the test's own and a hook that does as it is told."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pilot.coordination.coordinator import ClientCoordinator, ServerCoordinator
from pilot.coordination.provisioner import ClientKeys, ProvisionerCoordinator, RunKeys
from pilot.provision.hooks import Condition
from pilot.provision.life import Life, Patience, Phase, Record
from pilot.wire.messages import Fence, Heartbeat

from .kit import FakeHook

PATIENCE = Patience(start_within_s=300.0, drain_within_s=200.0, stop_within_s=100.0)


class Wished:
    """A coordinator that notes what is wished."""

    def __init__(self) -> None:
        self.wishes: list[str] = []

    def drain(self, client: str, reason: str, keys: ClientKeys) -> None:
        self.wishes.append(f"drain {reason}")

    def undrain(self, client: str) -> bool:
        self.wishes.append("undrain")
        return True


class World:
    """One client's life, in steps of ten seconds."""

    def __init__(self, **record: Any) -> None:
        self.hook, self.fleet, self.now_s = FakeHook(), Wished(), 1000.0
        self.told: list[tuple[str, str]] = []
        self.saves: list[Phase] = []
        self.keys = ClientKeys()
        self.record = Record(**record)
        self.life = Life(
            "a",
            self.record,
            self.hook,
            self.fleet,  # type: ignore[arg-type]
            PATIENCE,
            lambda _client, action, why: self.told.append((action, why)),
            lambda: self.saves.append(self.record.phase),
        )

    def step(self, seconds: float = 10.0, *, led: bool = True, **run: Any) -> Phase:
        self.now_s += seconds
        redis = run.pop("redis", True)
        keys = RunKeys(led, "running", clients={"a": self.keys}, **run) if redis else None
        self.life.step(self.now_s, seconds, keys, present=False)
        return self.record.phase


def test_a_life_from_off_to_off_loses_no_reply() -> None:
    world = World()
    assert world.step() == Phase.OFF
    world.record.run, world.record.why = True, "50 g/kWh, below 100 for 600 s"
    assert world.step() == Phase.STARTING and world.hook.calls == ["start"]
    assert world.saves[0] == Phase.STARTING, "written down before it is done"
    assert world.step() == Phase.STARTING and world.record.started
    world.keys = ClientKeys((1, 3), "x-1", "training")
    assert [world.step(), world.step()] == [Phase.ON, Phase.ON]
    world.record.run, world.record.reason = False, "300 g/kWh"
    assert [world.step(), world.step()] == [Phase.DRAINING, Phase.DRAINING]
    assert world.fleet.wishes == ["undrain", "drain 300 g/kWh"]
    # it trains, it sends, it is silent: as long as the server has not its last reply, it must not be stopped
    stop = "drained: pilot provision: 300 g/kWh"
    world.keys = ClientKeys((1, 3), "x-2", "sending", stop)
    assert world.step(current=(1, 3)) == Phase.DRAINING
    world.keys = ClientKeys(stop=stop, acknowledged=(1, 2))
    assert world.step(current=(1, 3)) == Phase.DRAINING
    assert world.step(redis=False) == Phase.DRAINING
    world.keys = ClientKeys(stop=stop, acknowledged=(1, 3))
    assert world.step(current=(1, 3)) == Phase.STOPPING
    assert world.hook.calls == ["start", "stop"]
    world.hook.condition = Condition.GONE
    assert world.step() == Phase.OFF
    assert world.fleet.wishes[-1] == "undrain", "or it could not come back"
    assert [action for action, _ in world.told] == ["up", "stop", "down"]
    assert world.told[1][1] == "the server has its last reply"


@pytest.mark.parametrize(
    ("fence", "keys", "run", "why"),
    [
        ((0, 0), ClientKeys(stop="x"), {}, "it was not at work"),
        ((1, 3), ClientKeys(stop="x"), {"current": (1, 4)}, "the server no longer waits for it"),
        ((1, 3), ClientKeys(stop="x"), {"current": (2, 1)}, "the server no longer waits for it"),
        ((1, 3), ClientKeys(stop="x"), {"current": (1, 3)}, ""),
        ((1, 3), ClientKeys((1, 3), "b", stop="x"), {"current": (1, 4)}, ""),
        ((0, 0), ClientKeys(), {}, ""),
    ],
)
def test_when_a_client_is_drained(
    fence: tuple[int, int], keys: ClientKeys, run: dict[str, Any], why: str
) -> None:
    world = World(phase=Phase.DRAINING, since_s=1000.0, fence=fence, beat=keys.beat)
    world.keys = keys
    assert world.step(**run) == (Phase.STOPPING if why else Phase.DRAINING)
    assert [reason for _, reason in world.told] == ([why] if why else [])


def test_a_drain_is_bounded_and_taken_back_when_the_signal_turns() -> None:
    world = World(phase=Phase.DRAINING, since_s=1000.0, fence=(1, 3), beat="x-1")
    world.keys = ClientKeys((1, 3), "x-1", "training")
    assert world.step(190.0) == Phase.DRAINING
    assert world.step(10.0) == Phase.STOPPING
    assert world.told == [("stop", "it did not drain within 200 s")]
    world = World(phase=Phase.DRAINING, since_s=1000.0, run=True, heard=True, started=True)
    assert [world.step(), world.step()] == [Phase.STARTING, Phase.ON]
    assert world.hook.calls == [] and world.fleet.wishes == ["undrain"]


def test_a_start_that_fails_is_tried_again_after_pauses_that_double() -> None:
    world = World(run=True)
    world.hook.condition, world.hook.why = Condition.GONE, "its process ended with code 1"
    starts = []
    for _ in range(400):
        before = len(world.hook.calls)
        world.step()
        starts += [world.now_s] if len(world.hook.calls) > before else []
    pauses = [round(later - first) for first, later in pairwise(starts)]
    assert pauses[:6] == [20, 30, 50, 90, 170, 330] and set(pauses[6:]) == {610}
    assert world.told[1] == ("failed", "its process ended with code 1; tried again in 20 s")


def test_a_client_that_does_not_appear_is_stopped_and_tried_again_but_only_if_a_server_leads() -> (
    None
):
    world = World(run=True)
    world.step()
    for _ in range(100):
        assert world.step(led=False) == Phase.STARTING, "the run has no server: it can't appear"
    for _ in range(29):
        assert world.step() == Phase.STARTING
    assert world.step() == Phase.STOPPING
    assert world.told[0][1] == "it did not appear as a client within 300 s; tried again later"
    world.hook.condition = Condition.GONE
    assert world.step() == Phase.OFF
    assert world.step() == Phase.STARTING and world.hook.calls == ["start", "stop", "start"]


def test_a_client_that_is_gone_is_started_again_and_one_of_unknown_state_is_listened_to() -> None:
    world = World(phase=Phase.ON, run=True, heard=True)
    world.hook.condition, world.hook.why = Condition.GONE, "its process ended with code 137"
    assert world.step() == Phase.OFF
    assert [world.step(0.0), world.step()] == [Phase.OFF, Phase.STARTING]
    world = World(phase=Phase.ON, run=True, heard=True)
    world.hook.condition = Condition.UNKNOWN
    for beat in range(60):
        world.keys = ClientKeys((1, 1), f"x-{beat}", "training")
        assert world.step() == Phase.ON
    for _ in range(29):
        assert world.step() == Phase.ON
    assert world.step() == Phase.STOPPING, "not a word for 300 s"


def test_a_stop_that_fails_is_repeated_and_one_that_hangs_is_forced() -> None:
    world = World(phase=Phase.STOPPING, since_s=1000.0)
    world.hook.condition, world.hook.why = Condition.FAILED, "its stop command ended with code 1"
    assert [world.step(), world.step()] == [Phase.STOPPING] * 2 and world.hook.calls == []
    world.step()
    assert world.hook.calls == ["kill", "stop"]
    assert world.told == [("stop failed", "its stop command ended with code 1; trying again")]
    world.hook.condition, world.hook.why = Condition.RUNNING, ""
    world.step(100.0)
    assert world.hook.calls[-2:] == ["kill", "stop"]
    assert world.told[-1][1] == "it did not stop within 100 s; trying again"


# -- the keys --------------------------------------------------------------------------------------


@pytest.fixture
def fleet(redis_url: str) -> Iterator[ProvisionerCoordinator]:
    coordinator = ProvisionerCoordinator(redis_url, "r")
    yield coordinator
    coordinator.close()


def test_a_provisioner_sees_the_run_and_its_wish_reaches_server_and_client(
    fleet: ProvisionerCoordinator, redis_url: str, leader: ServerCoordinator
) -> None:
    client = ClientCoordinator(redis_url, "r", client="a", term=1, round_number=1)
    client.send_heartbeat(Heartbeat(state="training"), expiry_s=60)
    leader.acknowledge("a", Fence("r", 1, 1, 7))
    seen = fleet.look(["a", "b"])
    assert seen is not None and (seen.led, seen.state, seen.current) == (True, "running", (1, 1))
    a = seen.clients["a"]
    assert (a.fence, a.busy, a.acknowledged, a.stop) == ((1, 1), True, (1, 1), "") and a.beat
    assert seen.clients["b"] == ClientKeys()
    fleet.drain("a", "dear", a)
    assert leader.draining(["a"]) == {"a": "drained: pilot provision: dear"}
    assert client.told_to_leave() == "drained: pilot provision: dear"
    seen = fleet.look(["a"])
    assert seen is not None and seen.clients["a"].drained_by_us and not seen.clients["a"].held
    assert fleet.undrain("a") and leader.draining(["a"]) == {}
    # an operator's wish is neither replaced nor taken back
    leader.stop_client("a", "maintenance")
    fleet.drain("a", "dear", ClientKeys())
    assert fleet.undrain("a") and leader.draining(["a"]) == {"a": "maintenance"}
    seen = fleet.look(["a"])
    assert seen is not None and seen.clients["a"].held == "maintenance"
    client.close()


def test_keys_that_anybody_wrote_say_nothing_and_no_redis_is_not_known(
    fleet: ProvisionerCoordinator, leader: ServerCoordinator, tmp_path: Path
) -> None:
    redis = leader._link.redis
    redis.set("pilot:r:client:a", "nonsense")
    redis.set("pilot:r:ack:a", "[[]]")
    redis.hset("pilot:r:stop:a", "x", "y")
    redis.hset("pilot:r:client:b", mapping={"term": "many", "state": "training"})
    seen = fleet.look(["a", "b"])
    assert seen is not None and seen.led and seen.clients["a"] == ClientKeys()
    assert seen.clients["b"].fence == (0, 0)
    away = ProvisionerCoordinator(f"unix://{tmp_path}/none.sock", "r")
    assert away.look(["a"]) is None and not away.undrain("a")
    away.drain("a", "x", ClientKeys())
    away.close()
