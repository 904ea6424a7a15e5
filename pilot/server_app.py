"""The ServerApp: checks everything that can be checked, wires the parts, and trains.

In a simulation `main` runs in a thread of Flower's process, in a deployment in the main thread, and
`flwr stop` ends the process within seconds; so being stopped arrives as an exit handler of Flower's
that sets an event, in both.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.exit import add_exit_handler

from nanochat.errors import UserError
from nanochat.rows.stream import shard_order
from pilot import plan
from pilot.config import DEFAULTS, RunConfig
from pilot.coordination.coordinator import CoordinatorError, ServerCoordinator, ping, resolve_url
from pilot.errors import PilotError
from pilot.processes.local_redis import LocalRedis
from pilot.redis_url import redact_url
from pilot.rules.ledger import Ledger
from pilot.rules.rounds import Clock, MonotonicClock
from pilot.run.directory import next_term, open_run_dir
from pilot.run.results import write_checkpoint, write_results
from pilot.run.snapshot import latest_snapshot, read_snapshot
from pilot.run.state import RunState
from pilot.run_name import generated_name
from pilot.server.alerts import Alerts, alert_url
from pilot.server.console import configure_logging
from pilot.server.failures import RunInterrupted
from pilot.server.mailbox import Mailbox
from pilot.server.prometheus import Prometheus
from pilot.server.report import Report
from pilot.server.round_loop import RoundLoop
from pilot.server.sinks import check_tensorboard
from pilot.server.telemetry import Telemetry
from pilot.wire import transfer

_SIMULATION = "flwr-simulation"
_PREDECESSOR_ENDS_S = (
    10.0  # for which a server waits for the one before, whose SuperLink was killed
)
_REDIS_RETURNS_S = 60.0  # for which a run that is resumed waits for its Redis

log = logging.getLogger("pilot")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Lead one run to its end. What raises here becomes the run's status `finished:failed`."""
    configure_logging()
    transfer.install()
    stopped = threading.Event()
    add_exit_handler(stopped.set)
    try:
        config = _configuration(context)
        simulation = grid.run.primary_task_type == _SIMULATION
        with (
            open_run_dir(config.run_name, within_s=_PREDECESSOR_ENDS_S) as run_dir,
            _redis_url(config, simulation) as url,
        ):
            _lead(config, grid, run_dir, url, simulation=simulation, stopped=stopped)
    except RunInterrupted as error:
        log.info("%s: run-name %s", error, config.run_name)
        raise
    except (PilotError, UserError) as error:
        log.error("error: %s", error)
        raise


def _configuration(context: Context) -> RunConfig:
    values = dict(context.run_config)
    values["run-name"] = values.get("run-name") or generated_name()
    config = RunConfig.from_mapping(values)
    plan.model_config(config)  # an impossible shape is reported now
    alert_url(config.alert_url)
    if config.tensorboard:
        check_tensorboard()
    log.info("Run %s", config.run_name)
    changed = {k: v for k, v in config.to_mapping().items() if v != DEFAULTS[k]}
    log.info("Configuration: %s", " ".join(f"{key}={value}" for key, value in changed.items()))
    return config


@contextlib.contextmanager
def _redis_url(config: RunConfig, simulation: bool) -> Iterator[str]:
    """The Redis of the environment or the configuration; in a simulation with neither, one of our own."""
    if url := resolve_url(config.redis_url):
        yield url
    elif simulation:
        with LocalRedis() as local:
            yield local.url
    else:
        raise PilotError(
            "a deployment needs a Redis: set PILOT_REDIS_URL, or redis-url in the run configuration"
        )


def _await_redis(url: str) -> None:
    """Wait for the Redis of a run that has begun: what took the server away may have taken that, too."""
    try:
        ping(url)
    except CoordinatorError as error:
        log.warning("warning: %s; waiting for it up to %.0f s", error, _REDIS_RETURNS_S)
        ping(url, within_s=_REDIS_RETURNS_S)


def _lead(
    config: RunConfig,
    grid: Grid,
    run_dir: Path,
    url: str,
    *,
    simulation: bool,
    stopped: threading.Event,
    clock: Clock | None = None,
) -> None:
    clock = clock or MonotonicClock()
    term = next_term(run_dir)
    if any((run_dir / "snapshots").glob("round-*")):
        _await_redis(url)
    coordinator = ServerCoordinator(url, config.run_name, term=term, run_dir=run_dir, clock=clock)
    finished = False
    try:
        state = _resume_or_start(config, run_dir)
        config = state.config  # with its own numbers, if it was begun before a default was "auto"
        log.info("Redis: %s", redact_url(url))
        telemetry_of_run = Telemetry(
            run_dir,
            config_dict=config.to_mapping(),
            wandb_mode=config.wandb_mode,
            wandb_project=config.wandb_project,
            run_name=config.run_name,
            wandb_id=state.wandb_id,
            tensorboard=config.tensorboard,
            **_followers(config, run_dir),
        )
        with coordinator.lock_renewed(), telemetry_of_run as telemetry:
            report = Report(telemetry)
            report.run_started(state, term)
            RoundLoop(
                config,
                state,
                term=term,
                mailbox=Mailbox(grid, clock),
                coordinator=coordinator,
                report=report,
                clock=clock,
                run_dir=run_dir,
                closed=simulation,
                interrupted=stopped.is_set,
                trained=lambda: _keep_unscored(state),
                version=lambda number: _version(config, run_dir, number),
            ).run()
            _finish(state, run_dir, report)
            finished = True
    finally:
        coordinator.finish(run_finished=finished)


def _followers(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Who follows the run's events besides its files. Raises PilotError for what is not installed."""
    followers: dict[str, Any] = {}
    if config.prometheus_port:
        followers["prometheus"] = Prometheus(
            config.run_name, config.prometheus_host, config.prometheus_port
        )
    if url := alert_url(config.alert_url):
        followers["alerts"] = Alerts(url, config.run_name, run_dir)
    return followers


def _resume_or_start(config: RunConfig, run_dir: Path) -> RunState:
    """The state of the newest whole snapshot, or that of a run that starts."""
    decay, scaled = config.weight_decay, plan.scaled_weight_decay(config)
    text = "Scaling weight decay from %.6f to %.6f for depth %d"
    log.info(text, decay, scaled, config.depth)
    snapshot = latest_snapshot(run_dir / "snapshots", report=log.warning)
    if snapshot is not None:
        state = RunState.from_snapshot(snapshot, config, shard_order=_shard_order(config))
        log.info("Resuming run %s after round %d", config.run_name, state.round_number)
    else:
        state = _start(config)
        parameters = sum(tensor.numel() for tensor in state.weights.values())
        total = state.total_tokens
        log.info("Training %s parameters on %s tokens", f"{parameters:,}", f"{total:,}")
    state.movement = plan.Movement.of(config)
    return state


def _start(config: RunConfig) -> RunState:
    order = _shard_order(config)
    ledger = Ledger(num_shards=config.num_shards, epochs=config.epochs, shard_order=order)
    total = plan.total_tokens(config)
    return RunState(config, plan.initial_weights(config), ledger, total_tokens=total)


def _version(config: RunConfig, run_dir: Path, round_number: int) -> RunState:
    """The run after an earlier round. Raises PilotError if that is not on disk any more."""
    if round_number == 0:
        return _start(config)
    snapshot = read_snapshot(run_dir / "snapshots", round_number)
    return RunState.from_snapshot(snapshot, config, shard_order=_shard_order(config))


def _shard_order(config: RunConfig) -> Callable[[int], list[int]]:
    return lambda epoch: shard_order(config.num_shards, epoch, config.seed)


def _keep_unscored(state: RunState) -> None:
    """The model is worth more than its last figure, for which clients may be missing."""
    log.info("Wrote %s; its last evaluation is to come", write_checkpoint(state))


def _finish(state: RunState, run_dir: Path, report: Report) -> None:
    final, checkpoint = write_results(state, run_dir)
    report.run_finished(state, final_model=str(final), checkpoint=str(checkpoint))
