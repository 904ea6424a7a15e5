"""One run, rehearsed from its first round to its last: the server's own parts over a `World`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pilot import plan
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.errors import PilotError
from pilot.faults import watched
from pilot.rehearse.client import UPDATE_SIZE
from pilot.rehearse.clock import VirtualClock
from pilot.rehearse.machine import Machine, Physics
from pilot.rehearse.trace import Happening
from pilot.rehearse.world import Horizon, RehearsedCoordinator, ServerKilled, World
from pilot.rules.ledger import Ledger
from pilot.run.directory import next_term
from pilot.run.snapshot import latest_snapshot, read_snapshot
from pilot.run.state import RunState
from pilot.server.mailbox import Mailbox
from pilot.server.report import Report
from pilot.server.round_loop import RoundLoop
from pilot.server.telemetry import Telemetry

RESTART_S = 15.0  # of a server that was killed, from its start to its first hello
# Of a round's shortest length: what a tick of the round loop may be longer for where nothing happens.
_LEAP_SHARE, _LEAP_MAX_S = 0.05, 60.0


class _Events(Telemetry):
    """Ends the rehearsal after a number of events, of all its terms together."""

    world: World

    def event(self, kind: str, message: str | None = None, **fields: Any) -> None:
        super().event(kind, message, **fields)
        self.world.happened()


class _Report(Report):
    """Without what is for somebody who watches: nobody does, and bars take longer than rounds."""

    def progress(self, *_: Any, **__: Any) -> None:
        pass


@dataclass
class Rehearsal:
    """What a run came to. `seconds` on its clock; `wasted_tokens` were trained and never merged.

    `failure`: why it ended before its tokens were trained; "" if they were, or the time was over.
    """

    state: RunState
    world: World
    seconds: float
    terms: int
    failure: str = ""

    @property
    def trained_tokens(self) -> int:
        return sum(client.trained_tokens for client in self.world.clients.values())

    @property
    def wasted_tokens(self) -> int:
        return self.trained_tokens - self.state.tokens


def rehearse(
    config: RunConfig,
    machines: Sequence[Machine],
    trace: Sequence[Happening],
    run_dir: Path,
    *,
    physics: Physics,
    seed: int,
    until_s: float,
    until_event: int = 0,
    restart_s: float = RESTART_S,
) -> Rehearsal:
    """Lead a run in `run_dir` (empty) to its end, for `until_s` seconds of its clock, or until `until_event`
    events have happened (0: all). A server that was killed needs `restart_s` from its start to its first hello.

    The same arguments give the same events, byte for byte, and with another end the first of them.
    """
    shortest_s = config.round_min_duration or config.round_max_duration
    clock = VirtualClock(leap_s=min(_LEAP_MAX_S, _LEAP_SHARE * shortest_s))
    world = World(clock, machines, physics, trace, seed=seed, events=until_event)

    def end() -> None:
        raise Horizon

    clock.at(until_s, end)
    terms, failure = 0, ""
    state = _state(config, run_dir)
    while True:
        terms += 1
        try:
            with watched(world.passes):
                _lead(state, world, run_dir)
        except ServerKilled as killed:
            _restart(world, killed.seconds, restart_s)
            state = _state(config, run_dir)
            continue
        except Horizon:
            state = _state(config, run_dir)  # what is on disk is what there is
        except PilotError as error:
            failure = str(error)
        for client in world.clients.values():
            client.end()
        return Rehearsal(state, world, clock.now_s(), terms, failure)


def _lead(state: RunState, world: World, run_dir: Path) -> None:
    config, clock, term = state.config, world.clock, next_term(run_dir)
    mailbox = Mailbox(cast(Any, world), clock, puller=world)
    telemetry = _Events(
        run_dir,
        config_dict=config.to_mapping(),
        wandb_mode="disabled",
        wandb_project="",
        run_name=config.run_name,
        wandb_id="rehearsed",
        clock=world.wall_clock,
    )
    telemetry.world = world
    with telemetry:
        report = _Report(telemetry)
        report.run_started(state, term)
        RoundLoop(
            config,
            state,
            term=term,
            mailbox=mailbox,
            coordinator=cast(ServerCoordinator, RehearsedCoordinator(world, config, term=term)),
            report=report,
            clock=clock,
            run_dir=run_dir,
            version=lambda number: _version(config, run_dir, number),
            wall_clock=world.wall_clock,
        ).run()


def _restart(world: World, down_s: float, restart_s: float) -> None:
    """Time passes without a server; one that is killed while it starts, starts again."""
    until_s = world.clock.now_s() + down_s + restart_s
    while world.clock.now_s() < until_s:
        try:
            world.clock.advance(until_s)
        except ServerKilled as killed:
            until_s = world.clock.now_s() + killed.seconds + restart_s
    world.forget_server()


def _state(config: RunConfig, run_dir: Path) -> RunState:
    snapshot = latest_snapshot(run_dir / "snapshots", report=lambda *_: None)
    if snapshot is None:
        return _start(config)
    return RunState.from_snapshot(snapshot, config, shard_order=_in_order(config))


def _start(config: RunConfig) -> RunState:
    """A model of a few numbers in place of the real one: no figure depends on its size but bytes."""
    ledger = Ledger(
        num_shards=config.num_shards, epochs=config.epochs, shard_order=_in_order(config)
    )
    return RunState(
        config, {"w": torch.zeros(UPDATE_SIZE)}, ledger, total_tokens=plan.total_tokens(config)
    )


def _version(config: RunConfig, run_dir: Path, number: int) -> RunState:
    if number == 0:
        return _start(config)
    snapshot = read_snapshot(run_dir / "snapshots", number)
    return RunState.from_snapshot(snapshot, config, shard_order=_in_order(config))


def _in_order(config: RunConfig) -> Any:
    return lambda epoch: list(range(config.num_shards))
