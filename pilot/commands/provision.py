"""`pilot provision CONFIG.toml`: starts and drains a run's clients by carbon, price and time."""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pilot.coordination.link import ping
from pilot.errors import PilotError
from pilot.processes.signals import end_signals_handled_by
from pilot.status.sources import redis_url

if TYPE_CHECKING:
    from pilot.provision.config import Config
    from pilot.provision.loop import Provisioner

_SIGNALS_WITHIN_S = 15.0  # for --check: a service may take ten seconds to answer


def add_provision(commands: Any) -> None:
    command = commands.add_parser(
        "provision",
        help="start and drain a run's clients by carbon intensity, price or time of day",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Read signals (carbon intensity, prices, calendars), decide by CONFIG.toml which clients of a\n"
            "run should work now, start them by its hooks, drain them without losing a reply, and keep\n"
            "books of energy, grams and money. Run it beside the run's server; it may be killed and\n"
            "started again at any time. Ctrl-C ends it and leaves the clients as they are. A finished\n"
            "run's clients are stopped. docs/provisioning.md describes every key of CONFIG.toml."
        ),
        epilog=(
            "examples:\n"
            "  pilot provision configs/provision/three-regions.toml --check\n"
            "  pilot provision configs/provision/three-regions.toml"
        ),
    )
    command.add_argument("config", type=Path, metavar="CONFIG.toml")
    command.add_argument(
        "--check",
        action="store_true",
        help="read configuration and signals, say what they are, and start nothing",
    )
    command.add_argument(
        "--stop-clients",
        action="store_true",
        help="on Ctrl-C or SIGTERM, drain and stop all clients first (a second one ends at once)",
    )
    command.add_argument("--json", action="store_true", help="print events as lines of JSON")
    command.set_defaults(function=provision)


def provision(arguments: argparse.Namespace) -> int:
    """`pilot provision`; raises PilotError for a mistake before anything starts."""
    # here: these import nanochat, which `pilot superlink`, the same program, may not hold
    from pilot.provision.config import read_config

    config = read_config(arguments.config)
    if arguments.check:
        return _check(config)
    url = redis_url()
    ping(url)
    with _provisioner(config, url, as_json=arguments.json) as provisioner:
        return _lead(provisioner, stop_clients=arguments.stop_clients)


def _lead(provisioner: "Provisioner", *, stop_clients: bool) -> int:
    """Until the run is finished, or a signal."""
    signals: list[int] = []

    def ends() -> bool:
        if signals and stop_clients and not provisioner.ending:
            provisioner.ending = f"{signal.Signals(signals[0]).name}, --stop-clients"
        return len(signals) > (1 if stop_clients else 0)

    with end_signals_handled_by(lambda signum, _frame: signals.append(signum)):
        provisioner.run(ends)
    return 128 + signals[0] if signals else 0


@contextlib.contextmanager
def _provisioner(config: "Config", url: str, *, as_json: bool) -> "Iterator[Provisioner]":
    """The only one of this run on this machine. Raises PilotError."""
    from nanochat.common import get_base_dir
    from pilot.coordination.provisioner import ProvisionerCoordinator
    from pilot.provision.clock import WallClock
    from pilot.provision.log import EventLog, Follower
    from pilot.provision.loop import Provisioner
    from pilot.provision.state import read_state

    directory = get_base_dir() / "provision" / config.run
    run_directory = get_base_dir() / "runs" / config.run
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(FileLock(directory / "lock", timeout=0))
        except Timeout:
            raise PilotError(
                f"`pilot provision` already runs for {config.run} on this machine: stop it first"
            ) from None
        except OSError as error:
            raise PilotError(f"cannot make {directory}: {error.strerror}") from error
        state = read_state(directory, config.run, time.time())
        log = EventLog(
            run_directory,
            directory,
            now_s=time.time,
            show=lambda line: print(line, flush=True),
            as_json=as_json,
        )
        fleet = ProvisionerCoordinator(url, config.run)
        stack.callback(fleet.close)
        follower = Follower(run_directory, state.offset)
        yield Provisioner(config, state, directory, fleet, log, follower, WallClock())


def _check(config: "Config") -> int:
    """Print each signal's reading; 1 if one has none."""
    from pilot.provision.config import open_source
    from pilot.provision.readings import SignalAway
    from pilot.provision.remote import NO_ANSWER_YET

    sources = {
        name: open_source(options, f"[signals.{name}]", time.time())
        for name, options in config.signals.items()
    }
    print(f"run {config.run}: clients {', '.join(config.clients)}")
    until_s = time.monotonic() + _SIGNALS_WITHIN_S
    trouble: dict[str, str] = {}
    for name, source in sources.items():
        while name not in trouble:
            try:
                print(f"signal {name}: {source.read(time.time())}")
                break
            except SignalAway as error:
                if str(error) != NO_ANSWER_YET or time.monotonic() >= until_s:
                    trouble[name] = str(error)
            time.sleep(0.05)
    for name, why in trouble.items():
        print(f"signal {name} is away: {why}", file=sys.stderr)
    return 1 if trouble else 0
