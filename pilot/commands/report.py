"""`pilot report RUN …`: reads the runs' directories and writes the page."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilot.errors import PilotError
from pilot.page.page import page
from pilot.page.script import vega_script
from pilot.page.story import Story, read_story, summary


def add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="write one HTML page about a run, or about several beside each other",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write a page about a run, from its directory alone: loss and bits per byte, who trained\n"
            "when, where the time went, who took part, rows by shard, speeds, bytes, refused replies,\n"
            "configuration. It is one file, and opens without a network. Also of a run that is not over."
        ),
        epilog=(
            "examples:\n  pilot report d20\n  pilot report d20 --json\n"
            "  pilot report d20 d20-one-site -o comparison.html"
        ),
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's name, or its directory; several are compared in one page",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write the page (default: RUN.html in the current directory)",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="the page's figures as JSON, an object per run, instead of the page; without -o: printed",
    )
    command.set_defaults(function=report)


def report(arguments: argparse.Namespace) -> int:
    """`pilot report`; raises PilotError for a run that is not there or has no events."""
    # here: `pilot superlink` is the same program and may hold nothing of nanochat, which runs bring along
    from nanochat.files import atomic_write_text

    stories = [read_story(run_directory(run)) for run in arguments.runs]
    if arguments.json and arguments.output is None:
        print(_figures(stories))
        return 0
    output = arguments.output or Path(f"{stories[0].directory.name}.html")
    if output.is_dir():
        raise PilotError(f"{output} is a directory: name a file")
    html = _figures(stories) + "\n" if arguments.json else page(stories, vega_script())
    try:
        atomic_write_text(output, html)
    except OSError as error:
        raise PilotError(f"cannot write {output}: {error.strerror}") from error
    print(f"{output} ({len(html.encode()) / 1e6:.1f} MB)")
    return 0


def _figures(stories: Sequence[Story]) -> str:
    return json.dumps([summary(story) for story in stories], indent=2, allow_nan=False)


def run_directory(run: str) -> Path:
    """The directory of a run that is named, or given by its path."""
    from nanochat.common import get_base_dir

    path = Path(run).expanduser()
    named = get_base_dir() / "runs" / run
    if "/" in run or (path.is_dir() and not named.is_dir()):
        return path.resolve()
    return named
