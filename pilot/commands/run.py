"""`pilot run CONNECTION`: checks the run configuration before anything starts, streams the log with one
progress bar per client, and stops everything it started on Ctrl-C."""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from pilot.config import RunConfig
from pilot.coordination.coordinator import resolve_url
from pilot.coordination.lock import ServerWatch
from pilot.errors import PilotError
from pilot.fleet.environment import of_running_fleet
from pilot.fleet.places import CONNECTION
from pilot.launch import connection as connections
from pilot.launch.bundle import stage
from pilot.launch.connection import Connection
from pilot.launch.flower_commands import FlowerCommands
from pilot.launch.flower_run import FlowerRun, Outcome
from pilot.launch.keep import keep_running
from pilot.launch.superlink import SuperLink
from pilot.overrides import load_run_config
from pilot.redis_url import redact_url
from pilot.run_name import generated_name

PROGRESS_MARK = (
    "shard_progress="  # of the server's progress lines: `client_0: loss=… shard_progress=…`
)
SUPERLINK_STARTS_S = (
    20.0  # for which a run that is resumed waits for a SuperLink before it counts as failed
)


def add_run(commands: Any) -> None:
    command = commands.add_parser(
        "run",
        help="run the federation: simulated on this machine, or deployed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Run the federation on a Flower connection: simulated clients on this machine\n"
            "(:local: connections, which need no preparation), or the sites of a deployment.\n"
            "Ctrl-C stops the run and all of its processes. Exit code 0: completed, 1: failed or\n"
            "stopped, 2: a mistake in the command or its configuration, 130: interrupted."
        ),
        epilog=(
            "examples:\n"
            "  pilot run local-simulation --run-config configs/tiny.toml\n"
            "  pilot run local-simulation --run-config configs/tiny.toml 'num-rounds=3 lr=0.01'\n"
            "  pilot run local-deployment --run-config 'run-name=\"d20\"'\n\n"
            "local-deployment is the fleet that `pilot up` runs here. Connections are the\n"
            "[superlink.NAME] tables of $FLWR_HOME/config.toml, or of\n"
            ".flwr/config.toml in the project; run-config keys and their defaults are those of\n"
            "[tool.flwr.app.config] in pyproject.toml."
        ),
    )
    command.add_argument(
        "connection",
        nargs="?",
        metavar="CONNECTION",
        help="name of a Flower connection (default: the one that the configuration names)",
    )
    command.add_argument(
        "--run-config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE|'KEY=VALUE …'",
        help="TOML files and key=value strings, merged; later ones win",
    )
    command.add_argument(
        "--app",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="directory of the Flower app (default: the current one)",
    )
    command.add_argument(
        "--keep",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resume a deployed run whose server is gone (a simulation ends with this command)",
    )
    command.set_defaults(function=run)


def run(arguments: argparse.Namespace) -> int:
    """`pilot run`."""
    app = arguments.app.expanduser().resolve()
    project = _read_project(app)
    overrides = load_run_config(arguments.run_config)
    config = None
    if project.get("project", {}).get("name") == "pilot":
        defaults = project["tool"]["flwr"]["app"].get("config", {})
        config = RunConfig.from_mapping({**defaults, **overrides})
    if arguments.connection == CONNECTION:
        os.environ.update(of_running_fleet())
    connection = connections.read_connection(arguments.connection, connections.find_flwr_home(app))
    console = Console(sys.stdout)
    with contextlib.closing(console):
        if connection.is_local:
            connections.check_resources(connection, connections.count_gpus())
            outcome = _run_locally(connection, app, project, overrides, console)
        else:
            connections.check_reachable(connection)
            kept = config if arguments.keep else None
            outcome = _run_remotely(connection, app, project, overrides, kept, console)
    if outcome.succeeded:
        return 0
    reason = f": {outcome.details}" if outcome.details else ""
    what = "was stopped" if outcome.was_stopped else "failed"
    print(f"error: {outcome.wish or f'the run {what}{reason}'}", file=sys.stderr)
    return 1


def _run_locally(
    connection: Connection,
    app: Path,
    project: Mapping[str, Any],
    overrides: Mapping[str, Any],
    console: "Console",
) -> Outcome:
    """A simulation on a private SuperLink, which ends with it."""
    if any(character.isspace() for character in sys.executable):
        raise PilotError(
            f"Ray, which simulates the clients, cannot start {sys.executable}: "
            "move the project to a path without spaces"
        )
    console.show(f"Starting Flower for {connection.clients} simulated clients")
    with SuperLink(connection, app) as superlink:
        config = _write_overrides(superlink.scratch, overrides)
        bundle = stage(app, project, superlink.scratch)
        commands = FlowerCommands(bundle, superlink.env)
        flower = FlowerRun(connection.name, bundle, commands)
        try:
            flower.submit(config)
            return flower.follow(console.show, superlink.failure)
        except KeyboardInterrupt:
            console.show("Stopping the run and all of its processes")
            raise
        finally:
            flower.close()
            commands.close()


def _run_remotely(
    connection: Connection,
    app: Path,
    project: Mapping[str, Any],
    overrides: Mapping[str, Any],
    kept: RunConfig | None,
    console: "Console",
) -> Outcome:
    """A run on the SuperLink of a deployment; `kept`: the configuration of one that is resumed if it fails."""
    scratch = Path(tempfile.mkdtemp(prefix="pilot-"))
    env = {**connections.flower_environment(), "FLWR_HOME": str(connection.flwr_home)}
    bundle, run_name = stage(app, project, scratch), ""
    if kept is not None:
        run_name = kept.run_name or generated_name()
        overrides = {**overrides, "run-name": run_name}
    path = _write_overrides(scratch, overrides)
    watch = _server_watch(kept, run_name)
    commands = FlowerCommands(bundle, env)
    flower = FlowerRun(connection.name, bundle, commands)

    def submit() -> FlowerRun:
        nonlocal flower
        if flower.run_id is not None:  # the SuperLink may be starting again
            connections.check_reachable(connection, within_s=SUPERLINK_STARTS_S)
        flower = FlowerRun(connection.name, bundle, commands)
        if watch is not None:
            watch.begin()
        flower.submit(path)
        console.show(f"Run {flower.run_id} at {redact_url(connection.address)}")
        return flower

    def follow(run: FlowerRun, show: Callable[[str], None]) -> Outcome:
        if watch is None:
            return run.follow(show)
        return run.follow(show, watch.failure, ends_within_s=0.0)  # Redis knows a good end

    try:
        if kept is None:
            return follow(submit(), console.show)
        return keep_running(submit, follow, console.show, run_name=run_name)
    except KeyboardInterrupt:
        console.show("Stopping the run")
        flower.wait_for_id(timeout_s=15)  # the run may have been submitted just now
        flower.stop()
        raise
    finally:
        flower.close()
        commands.close()
        if watch is not None:
            watch.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _server_watch(config: RunConfig | None, run_name: str) -> ServerWatch | None:
    """Sees in the run's Redis, if this machine knows it, that a server is gone; Flower takes a minute."""
    url = resolve_url(config.redis_url) if config is not None else ""
    return ServerWatch(url, run_name) if url else None


class Console:
    """Prints the run's log; on a terminal each client's progress line stays in its place."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pins = stream.isatty()
        self._bars: dict[str, tqdm[NoReturn]] = {}

    def show(self, line: str) -> None:
        """Print a line, or update the bar of the client that it begins with."""
        name, colon, _ = line.partition(":")
        if not self._pins:
            print(line, file=self._stream, flush=True)
        elif PROGRESS_MARK in line and colon:
            if name not in self._bars:
                self._bars[name] = tqdm(
                    file=self._stream,
                    position=len(self._bars),
                    bar_format="{desc}",
                )
            # asked each time, since terminals are resized; some report 0, which means unknown
            self._bars[name].ncols = shutil.get_terminal_size().columns
            self._bars[name].set_description_str(line)
        else:
            tqdm.write(line, file=self._stream)

    def close(self) -> None:
        """Leave the bars as they are and move the cursor below them."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()


def _read_project(app: Path) -> dict[str, Any]:
    path = app / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        project["tool"]["flwr"]["app"]
    except FileNotFoundError:
        raise PilotError(
            f"there is no {path}: run this from the project's directory, or name it with --app"
        ) from None
    except KeyError:
        raise PilotError(f"{path} describes no Flower app ([tool.flwr.app])") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PilotError(f"cannot read {path}: {error}") from error
    return project


def _write_overrides(scratch: Path, overrides: Mapping[str, Any]) -> Path | None:
    """The merged run configuration as the one file that Flower takes."""
    if not overrides:
        return None
    path = scratch / "run-config.toml"
    connections.write_toml(path, overrides)
    return path
