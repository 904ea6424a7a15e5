"""The `pilot` command: `pilot run CONNECTION` is `flwr run`, `pilot node` is flower-supernode and
`pilot superlink` is flower-superlink, with what Flower leaves out; `pilot report` shows a run.

`pilot run` merges and checks the run configuration before anything starts, streams the log with one progress
bar per client, stops everything it started on Ctrl-C, and has an exit code to rely on: 0 completed, 1 failed or
stopped, 2 a mistake that one sentence names, 130 and 143 interrupted.
"""

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

from pilot.config import RunConfig
from pilot.coordination.coordinator import resolve_url
from pilot.coordination.lock import ServerWatch
from pilot.errors import PilotError
from pilot.launch import connection as connections
from pilot.launch.bundle import stage
from pilot.launch.connection import Connection
from pilot.launch.flower_commands import FlowerCommands
from pilot.launch.flower_run import FlowerRun, Outcome
from pilot.launch.keep import keep_running
from pilot.launch.kept_superlink import run_superlink
from pilot.launch.node import NodeOptions, default_name, run_node, speaker
from pilot.launch.superlink import SuperLink
from pilot.overrides import load_run_config
from pilot.page.command import add_report
from pilot.processes.signals import end_signals_handled_by
from pilot.redis_url import redact_url
from pilot.run_name import generated_name

PROGRESS_MARK = (
    "shard_progress="  # of the server's progress lines: `client_0: loss=… shard_progress=…`
)
SUPERLINK_STARTS_S = (
    20.0  # for which a run that is resumed waits for a SuperLink before it counts as failed
)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.function in (node, superlink):
        arguments.flower = rest  # options of Flower's own program
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _signals_as_exceptions():
            code: int = arguments.function(arguments)
            return code
    except PilotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return interrupt.exit_code if isinstance(interrupt, Interrupted) else 130


def run(arguments: argparse.Namespace) -> int:
    """`pilot run`."""
    app = arguments.app.expanduser().resolve()
    project = _read_project(app)
    overrides = load_run_config(arguments.run_config)
    config = None
    if project.get("project", {}).get("name") == "pilot":
        defaults = project["tool"]["flwr"]["app"].get("config", {})
        config = RunConfig.from_mapping({**defaults, **overrides})
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
    what = "was stopped" if outcome.status == "finished:stopped" else "failed"
    print(f"error: the run {what}{reason}", file=sys.stderr)
    return 1


def node(arguments: argparse.Namespace) -> int:
    """`pilot node`."""
    options = NodeOptions(
        name=arguments.name,
        supernode=[word for word in arguments.flower if word != "--"],
        preempt_file=arguments.preempt_file,
        leave_within_s=arguments.leave_within,
        device_batch_size=arguments.device_batch_size,
    )
    return run_node(options, say=speaker(f"node {options.name}"))


def superlink(arguments: argparse.Namespace) -> int:
    """`pilot superlink`."""
    options = [word for word in arguments.flower if word != "--"]
    return run_superlink(options, say=speaker("superlink"))


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


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP raise Interrupted, so that every exit runs `finally` blocks."""

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with end_signals_handled_by(interrupt):
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pilot", description="Federated pretraining of GPTs.")
    parser.add_argument("--version", action="version", version=f"pilot {version('pilot')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_node(commands)
    _add_superlink(commands)
    add_report(commands)
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
            "Connections are the [superlink.NAME] tables of $FLWR_HOME/config.toml, or of\n"
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
    return parser


def _add_node(commands: Any) -> None:
    command = commands.add_parser(
        "node",
        help="run a site's SuperNode: restart it on exit, and drain it without losing a reply",
        allow_abbrev=False,  # an option that is not ours is flower-supernode's
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Run flower-supernode and restart it when it exits; options that are not listed here are\n"
            "passed on to it. On SIGTERM, Ctrl-C or a preemption notice the client finishes its\n"
            "micro-step and replies. Once the server confirms through Redis (PILOT_REDIS_URL) that it\n"
            "has the reply on disk, the command exits with code 0. A second signal ends it at once."
        ),
        epilog=("example:\n  pilot node --name site-a --insecure --superlink 127.0.0.1:8000"),
    )
    command.add_argument(
        "--name",
        default=default_name(),
        help="the client's name, such as site-a (default: this machine's)",
    )
    command.add_argument(
        "--preempt-file",
        default="",
        metavar="FILE",
        help="leave when this file appears (default: PILOT_PREEMPT_FILE, or the run's preempt-file)",
    )
    command.add_argument(
        "--leave-within",
        type=float,
        metavar="SECONDS",
        help="wait at most this long for the server (default: the run's drain-deadline, and twice "
        "what the last reply took, at least 60 s)",
    )
    command.add_argument(
        "--device-batch-size",
        type=int,
        metavar="ROWS",
        help="rows per device and forward pass on this client; 0: what fits (default: the run's)",
    )
    command.set_defaults(function=node)


def _add_superlink(commands: Any) -> None:
    command = commands.add_parser(
        "superlink",
        help="run the SuperLink of a deployment: start it again when it dies, and runs without delay",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Run flower-superlink, to which all options are passed on. When it dies it is started again at\n"
            "once, without imports, and so are the servers of runs. Ctrl-C or SIGTERM ends it."
        ),
        epilog="example:\n  pilot superlink --insecure --disable-runtime-dependency-installation",
    )
    command.set_defaults(function=superlink)


if __name__ == "__main__":
    sys.exit(main())
