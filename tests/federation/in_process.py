"""A federation whose server is this process: no Flower, but real worker groups and a real Redis."""

from pathlib import Path

from flwr.app import RecordDict

from nanochat.rows.stream import shard_order
from pilot.client_app import answer
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.plan import initial_weights, total_tokens
from pilot.processes.local_redis import LocalRedis
from pilot.rules.ledger import Ledger
from pilot.rules.rounds import MonotonicClock
from pilot.run.directory import open_run_dir
from pilot.run.results import write_results
from pilot.run.state import RunState
from pilot.server.mailbox import Mailbox
from pilot.server.report import Report
from pilot.server.round_loop import RoundLoop
from pilot.server.telemetry import Telemetry

from .local_grid import Handler, LocalGrid


def federate(config: RunConfig, *clients: str) -> tuple[RunState, Path]:
    """Lead `config` over `clients`; the state at its end, and the final model."""
    grid = LocalGrid({number: _client(name) for number, name in enumerate(clients, start=1)})
    ledger = Ledger(
        num_shards=config.num_shards,
        epochs=config.epochs,
        shard_order=lambda epoch: shard_order(config.num_shards, epoch, config.seed),
    )
    state = RunState(config, initial_weights(config), ledger, total_tokens(config))
    clock = MonotonicClock()
    with LocalRedis() as redis, open_run_dir(config.run_name) as run_dir:
        coordinator = ServerCoordinator(redis.url, config.run_name, term=1, run_dir=run_dir)
        telemetry = Telemetry(
            run_dir, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="x"
        )
        RoundLoop(
            config,
            state,
            term=1,
            mailbox=Mailbox(grid, clock),  # type: ignore[arg-type]  # what Grid is used for
            coordinator=coordinator,
            report=Report(telemetry),
            clock=clock,
            run_dir=run_dir,
        ).run()
        coordinator.finish()
        return state, write_results(state, run_dir)[0]


def _client(name: str) -> Handler:
    def handle(kind: str, content: RecordDict) -> RecordDict:
        return answer(content, name)

    return handle
