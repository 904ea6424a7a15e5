"""A provisioner with a clock, a Redis and hooks that a test moves: decisions, books, events, its death."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilot.coordination.provisioner import ClientKeys, RunKeys
from pilot.errors import PilotError
from pilot.provision.config import read_config
from pilot.provision.hooks import Condition
from pilot.provision.life import Phase
from pilot.provision.log import EventLog, Follower
from pilot.provision.loop import Provisioner
from pilot.provision.state import read_state
from pilot.run.events import read_events

from .kit import FakeClock, FakeHook

CONFIG = """
run = "r"
every = 10
[limits]
{limits}
[signals.west]
kind = "file"
file = "west"
unit = "g/kWh"
max-age = 1e12
when-away = "{away}"
[signals.price]
kind = "file"
file = "price"
max-age = 1e12
[defaults]
signal = "west"
carbon = "west"
price = "price"
start-below = 100
hold = 20
idle-w = 1000
training-w = 2000
pue = 1.5
start = ["true"]
[clients.a]
[clients.b]
start-below = 40
"""


class Redis:
    """What Redis says; `keys` None: it is away."""

    def __init__(self) -> None:
        self.keys: RunKeys | None = RunKeys(True, "running")
        self.clients: dict[str, ClientKeys] = {}
        self.wishes: list[tuple[str, str]] = []

    def look(self, names: Any) -> RunKeys | None:
        if self.keys is None:
            return None
        clients = {name: self.clients.get(name, ClientKeys()) for name in names}
        return RunKeys(self.keys.led, self.keys.state, self.keys.current, clients)

    def drain(self, client: str, reason: str, keys: ClientKeys) -> None:
        self.wishes.append((client, reason))
        self.clients[client] = ClientKeys(stop=f"drained: pilot provision: {reason}")

    def undrain(self, client: str) -> bool:
        self.clients.pop(client, None)
        return True


class World:
    """A directory, and provisioners in it one after the other."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self.clock, self.redis = directory, FakeClock(), Redis()
        self.run_directory = directory / "runs" / "r"
        self.shown: list[str] = []
        self.hooks: dict[str, FakeHook] = {}
        self._patch = monkeypatch

    def signal(self, name: str, text: object) -> None:
        (self.directory / name).write_text(str(text))

    def provisioner(self, limits: str = "", away: str = "keep") -> Provisioner:
        path = self.directory / "config.toml"
        path.write_text(CONFIG.format(limits=limits, away=away))
        config = read_config(path)
        state = read_state(self.directory, "r", self.clock.now)
        log = EventLog(
            self.run_directory, self.directory, now_s=self.clock.now_s, show=self.shown.append
        )
        follower = Follower(self.run_directory, state.offset)

        def hook(place: Any, *_: Any) -> FakeHook:
            return self.hooks.setdefault(place.client, FakeHook())

        self._patch.setattr("pilot.provision.loop.SubprocessHook", hook)
        redis: Any = self.redis
        return Provisioner(config, state, self.directory, redis, log, follower, self.clock)

    def ticks(self, provisioner: Provisioner, count: int) -> bool:
        over = False
        for _ in range(count):
            over = provisioner.tick()
            self.clock.now += 10.0
        return over

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = [
            *read_events(self.directory / "events.jsonl"),
            *read_events(self.run_directory / "events.jsonl"),
        ]
        return [event for event in found if event["event"] == kind]

    def actions(self) -> list[tuple[str, str]]:
        return [(event["client"], event["action"]) for event in self.events("provision")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    found = World(tmp_path, monkeypatch)
    found.signal("west", 300)
    found.signal("price", 0.2)
    return found


def phases(provisioner: Provisioner) -> dict[str, Phase]:
    return {name: record.phase for name, record in provisioner.state.records.items()}


def test_a_signal_starts_and_drains_and_each_decision_has_its_reason(world: World) -> None:
    provisioner = world.provisioner()
    world.ticks(provisioner, 3)
    assert world.actions() == []
    world.signal("west", 90)
    world.ticks(provisioner, 2)
    assert world.actions() == [], "it has to hold for 20 s"
    world.ticks(provisioner, 2)
    assert phases(provisioner) == {"a": Phase.STARTING, "b": Phase.OFF}
    world.redis.clients["a"] = ClientKeys((1, 1), "x", "training")
    world.ticks(provisioner, 1)
    assert phases(provisioner)["a"] == Phase.ON
    world.signal("west", 300)
    world.ticks(provisioner, 4)
    assert world.actions() == [("a", "start"), ("a", "up"), ("a", "drain")]
    assert world.redis.wishes[0] == ("a", "300 g/kWh, above 100 for 20 s")
    reasons = [event["reason"] for event in world.events("provision")]
    assert reasons == ["90 g/kWh, below 100 for 20 s", "it takes part", world.redis.wishes[0][1]]
    line = next(line for line in reversed(world.shown) if line.startswith("draining: "))
    assert line.startswith("draining: a (300 g/kWh, above 100 for 20 s); off: b (300 g/kWh)")


def test_a_signal_that_is_away_is_said_once_and_falls_back(world: World) -> None:
    (world.directory / "west").unlink()
    world.ticks(world.provisioner(), 3)
    assert [event["state"] for event in world.events("provision_signal")] == ["away"]
    assert world.events("provision_signal")[0]["signal"] == "west" and world.actions() == []
    provisioner = world.provisioner(away="start")
    world.ticks(provisioner, 2)
    assert world.actions() == [("a", "start"), ("b", "start")]
    world.ticks(world.provisioner(away="keep"), 2)
    assert world.actions()[2:] == []
    last = world.provisioner(away="drain")
    world.ticks(last, 2)
    assert world.actions()[2:] == [("a", "drain"), ("b", "drain")]
    world.signal("west", 10)
    world.ticks(last, 1)
    assert [event["state"] for event in world.events("provision_signal")][-2:] == ["away", "back"]


def on(world: World, provisioner: Provisioner, state: str = "training") -> None:
    """a and b run, and are heard."""
    world.signal("west", 10)
    world.ticks(provisioner, 3)
    for name in ("a", "b"):
        world.redis.clients[name] = ClientKeys((1, 1), "x", state)
    world.ticks(provisioner, 1)
    assert set(phases(provisioner).values()) == {Phase.ON}


def test_a_provisioner_that_dies_starts_nothing_twice_and_its_books_have_no_gap(
    world: World,
) -> None:
    first = world.provisioner()
    on(world, first)
    first.save()
    before = first.state.accounts["a"].total
    world.clock.now += 3600.0 - 10.0
    again = world.provisioner()
    world.ticks(again, 3)
    assert {name: hook.calls for name, hook in world.hooks.items()} == {
        "a": ["start"],
        "b": ["start"],
    }
    assert world.actions() == [("a", "start"), ("b", "start"), ("a", "up"), ("b", "up")]
    # an hour at 2 kW and PUE 1.5, at 10 g and 0.2 money per kWh; then two looks of 10 s
    took = again.state.accounts["a"].total
    assert took.on_s - before.on_s == pytest.approx(3620.0)
    assert took.kwh - before.kwh == pytest.approx(3.0 * 3620 / 3600)
    assert took.grams - before.grams == pytest.approx(30.0 * 3620 / 3600)
    assert took.money - before.money == pytest.approx(0.6 * 3620 / 3600)


def test_a_hold_survives_the_provisioner_too(world: World) -> None:
    world.signal("west", 90)
    first = world.provisioner()
    world.ticks(first, 1)
    first.save()
    world.clock.now += 10
    world.ticks(world.provisioner(), 1)
    assert world.actions() == [("a", "start")]


def test_energy_is_told_with_the_tokens_that_the_server_merged(world: World) -> None:
    world.run_directory.mkdir(parents=True)
    path = world.run_directory / "events.jsonl"
    path.write_text('{"event": "reply", "client": "a", "tokens": 999}\n{"torn')
    provisioner = world.provisioner()
    on(world, provisioner, state="starting")
    with path.open("a") as file:
        file.write('\n{"event": "reply", "client": "a", "tokens": 1500000}\n')
        file.write('{"event": "reply", "client": "c", "tokens": 7}\n')
    world.ticks(provisioner, 1)
    provisioner.report_energy()
    mine = [event for event in world.events("energy") if event["client"] == "a"]
    total = provisioner.state.accounts["a"].total
    assert sum(event["tokens"] for event in mine) == 1_500_000, "what was before is not ours"
    assert sum(event["kwh"] for event in mine) == pytest.approx(total.kwh)
    assert total.kwh == pytest.approx(1.5 * total.on_s / 3600) and total.training_s == 0
    assert total.grams_per_million_tokens(1_500_000) == pytest.approx(total.grams / 1.5)
    b = provisioner.state.accounts["b"].total
    per = (total.grams + b.grams) / 1.5
    assert provisioner.status().endswith(f", {per:.4g} g per million tokens")
    provisioner.report_energy()
    assert len([e for e in world.events("energy") if e["client"] == "a"]) == len(mine)
    lines = path.read_text().splitlines()
    assert lines[1] == '{"torn', "a line of ours was glued to half a line of the server's"


def test_what_happened_before_the_run_had_a_directory_moves_into_its_record(world: World) -> None:
    provisioner = world.provisioner()
    on(world, provisioner)
    own, before = world.directory / "events.jsonl", world.actions()
    assert own.exists() and len(before) == 4
    world.run_directory.mkdir(parents=True)
    world.signal("west", 300)
    world.ticks(provisioner, 3)
    assert not own.exists() and world.actions() == [*before, ("a", "drain"), ("b", "drain")]


def test_the_runs_budget_ends_it_for_all(world: World) -> None:
    provisioner = world.provisioner(limits="grams = 1.0")
    on(world, provisioner)
    world.ticks(provisioner, 20)
    assert ("a", "drain") in world.actions() and ("b", "drain") in world.actions()
    reasons = {event["reason"] for event in world.events("provision") if event["action"] == "drain"}
    assert reasons == {"the run's budget of 1 grams is used up"}


def test_a_finished_run_stops_all_and_an_interrupted_one_does_not(world: World) -> None:
    provisioner = world.provisioner()
    on(world, provisioner)
    world.redis.keys = RunKeys(False, "interrupted")
    assert not world.ticks(provisioner, 3) and set(phases(provisioner).values()) == {Phase.ON}
    world.redis.keys = None
    assert not world.ticks(provisioner, 3) and set(phases(provisioner).values()) == {Phase.ON}
    world.redis.keys = RunKeys(False, "finished")
    for name in ("a", "b"):
        world.redis.clients[name] = ClientKeys()
    assert not world.ticks(provisioner, 3)
    assert [hook.calls for hook in world.hooks.values()] == [["start", "stop"]] * 2
    for hook in world.hooks.values():
        hook.condition = Condition.GONE
    assert world.ticks(provisioner, 2)
    assert set(phases(provisioner).values()) == {Phase.OFF}


def test_ends_only_when_it_is_asked_and_leaves_clients_as_they_are(world: World) -> None:
    provisioner = world.provisioner()
    on(world, provisioner)
    asked = iter([False, False, True])
    provisioner.run(lambda: next(asked))
    assert set(phases(provisioner).values()) == {Phase.ON}
    assert [hook.calls for hook in world.hooks.values()] == [["start"]] * 2


def test_a_client_that_runs_may_not_vanish_from_the_configuration(world: World) -> None:
    provisioner = world.provisioner()
    on(world, provisioner)
    provisioner.save()
    document = json.loads((world.directory / "state.json").read_text())
    document["clients"]["old"] = document["clients"]["a"]
    (world.directory / "state.json").write_text(json.dumps(document))
    with pytest.raises(PilotError, match="client old may still run, but the configuration"):
        world.provisioner()
    document["clients"]["old"]["phase"] = "off"
    (world.directory / "state.json").write_text(json.dumps(document))
    world.ticks(world.provisioner(), 1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "{",
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 9'),
        lambda text: text.replace('"phase"', '"phases"'),
        lambda text: text.replace('"run": "r"', '"run": "other"'),
    ],
)
def test_a_state_of_somebody_else_is_a_sentence(spoil: Callable[[str], str], world: World) -> None:
    provisioner = world.provisioner()
    world.ticks(provisioner, 1)
    path = world.directory / "state.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(PilotError, match="restore it, or remove it"):
        world.provisioner()
