"""What a round costs besides training, beside Flower's own floor and the old way, by the model's size.

python -m benchmarks.round_overhead                                # 10, 100 and 186 M parameters, three ways
python -m benchmarks.round_overhead --sizes 10 --ways new,flower --set wire-up=int8

Real SuperLink, SuperNodes (`pilot node`), Redis and `pilot run`, two clients on this machine over loopback;
rows of generated text, two optimizer steps a round. Ways:

    new      the defaults, with what --set says (wire-up=int4 unless it says otherwise)
    flower   in the same federation, after that run: an app that only sends as many bytes both ways
    old      wire-up=float32 wire-down=full worker-idle=0 (of those, the keys that there are)

Every way gives its rounds one by one (phases in seconds, which add up to `round_s`: docs/protocol.md, *Where
time goes*), and the median of those after the first, which starts the workers. `fixed_s` is all that is not
training, `peak_rss_bytes` of the largest process of each kind, `worst_rss_per_parameter` of the ServerApp.
`goal`: a fixed cost of at most a quarter of the old way's, and at most 1.3 times Flower's floor plus 4 s. One
line of JSON; progress on standard error.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.overhead import flower, ways
from benchmarks.overhead.sizes import SIZES, config, parameters
from nanochat.common import ArgumentParser, run_command_line
from nanochat.errors import UserError
from pilot.config import DEFAULTS
from pilot.overrides import load_run_config

_WAYS = ("new", "flower", "old")
_SITES = ("site-a", "site-b")
_OLD = {"wire-up": "float32", "wire-down": "full", "worker-idle": 0.0}
_NEW = {"wire-up": "int4"}
_STEPS = 2
_OF_OLD, _OF_FLOWER, _OVER_FLOWER_S = 0.25, 1.3, 4.0  # the goal


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.round_overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--sizes", default="10,100,186", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--ways", default=",".join(_WAYS), help=f"of {', '.join(_WAYS)}")
    parser.add_argument("--rounds", type=int, default=4, help="of each way; the first one is cold")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the new way")
    parser.add_argument("--dir", type=Path, help="keep logs and runs in this directory")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a run may take")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    sizes, which = _names(arguments.sizes, SIZES), _names(arguments.ways, _WAYS)
    if arguments.rounds < 2:
        raise UserError(f"--rounds is {arguments.rounds}: the first is cold, so at least 2")
    with tempfile.TemporaryDirectory(prefix="pilot-overhead-") as directory:
        where = arguments.dir.resolve() if arguments.dir else Path(directory)
        found = {name: _measure(name, which, arguments, where) for name in sizes}
    print(json.dumps({"cores": os.cpu_count(), "clients": len(_SITES), "sizes": found}))


def _names(text: str, known: Any) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"there is no {name!r}: choose of {', '.join(known)}")
    return names


def _measure(name: str, which: list[str], arguments: Namespace, where: Path) -> dict[str, Any]:
    base = where / "base"
    base.mkdir(parents=True, exist_ok=True)
    limits = ways.Limits(arguments.limit, threading.Event())
    keys = {**_NEW, **load_run_config(arguments.set)}
    found: dict[str, Any] = {}
    for way in which:
        if way == "flower":
            continue  # with the run whose bytes it sends
        own = keys if way == "new" else {k: v for k, v in _OLD.items() if k in DEFAULTS}
        stamp = f"{int(time.time()):x}-{os.getpid()}"
        values = (
            config(
                base,
                SIZES[name],
                run_name=f"{way}-{stamp}",
                round_steps=_STEPS,
                num_rounds=arguments.rounds,
            )
            | {"min-clients": len(_SITES), "quorum": len(_SITES)}
            | own
        )
        found["parameters"] = parameters(values)
        _say(f"{name}: {way}, {found['parameters']:,} parameters")
        directory = where / f"{name}-{way}-{stamp}"
        with ways.federation(directory, base, values, _SITES) as running:
            found[way] = {"config": own} | ways.measured(running, limits)
            if way == "new" and "flower" in which:
                _say(f"{name}: flower")
                found["flower"] = _floor(running, found[way], arguments)
    return found | _compared(found)


def _floor(running: Any, new: dict[str, Any], arguments: Namespace) -> dict[str, Any]:
    down, up = new["bytes_down_per_client"], new["bytes_up_per_client"]
    seconds = flower.echo(
        running.directory / "echo",
        running.environment,
        clients=len(_SITES),
        rounds=arguments.rounds,
        bytes_down=down,
        bytes_up=up,
        timeout_s=arguments.limit,
    )
    floor_s = statistics.median(one["round_s"] for one in seconds[1:])
    return {"round_s": round(floor_s, 3), "rounds": seconds, "bytes_down": down, "bytes_up": up}


def _compared(found: dict[str, Any]) -> dict[str, Any]:
    """What the goal asks for, as far as the ways were run."""
    goal: dict[str, Any] = {}
    if "new" in found:
        fixed_s, count = found["new"]["fixed_s"], found["parameters"]
        peak = found["new"]["peak_rss_bytes"].get("serverapp", 0)
        goal["worst_rss_per_parameter"] = round(peak / count, 2)
        if "old" in found:
            goal["of_old"] = round(fixed_s / found["old"]["fixed_s"], 3)
        if "flower" in found:
            goal["over_flower_s"] = round(fixed_s - _OF_FLOWER * found["flower"]["round_s"], 3)
        if "old" in found and "flower" in found:
            goal["met"] = goal["of_old"] <= _OF_OLD and goal["over_flower_s"] <= _OVER_FLOWER_S
    return {"goal": goal}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    run_command_line(main)
