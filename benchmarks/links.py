"""How much of its time a site trains, by the width of its line, the wire format and the length of a round.

python -m benchmarks.links                          # 10 M parameters; 10, 50, 200 and 1,000 Mbit/s; two forms
python -m benchmarks.links --rates 10 --wires int4 --seconds 300
python -m benchmarks.links --quick                  # a tiny model on 1 Mbit/s, whose upload takes ten seconds

Real SuperLink, SuperNode (`pilot node`), Redis and `pilot run`, one client: between it and the SuperLink is a
proxy of --rates Mbit/s each way, which its Redis shares. Rounds of --seconds are run, the first of which is
cold; `utilisation` is the median goodput of the others (docs/protocol.md, *Where time goes*). `cost_s` is what
of such a round is not training; of these, `begin_s` pass between its opening and its first step, the rest after
its end. From that follows `utilisation_of`, by seconds of a round: extrapolated where it is not --seconds.
`silent`: how often the client counted as dead. One line of JSON; progress on standard error.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.overhead import ways
from benchmarks.overhead.sizes import SIZES, config, parameters
from nanochat.common import ArgumentParser, run_command_line
from nanochat.errors import UserError
from pilot.run.events import EVENTS_FILE, read_events

_SITE = "site-a"
_LENGTHS_S = (60, 300, 600, 1800)
_BEGINNING = ("dispatch", "start", "evaluation", "packing")
_QUICK = {"size": "tiny", "rates": "1", "wires": "float32", "rounds": 2, "seconds": 0.0}


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.links", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="10", choices=sorted(SIZES), help="million parameters")
    parser.add_argument("--rates", default="10,50,200,1000", help="Mbit/s, with commas")
    parser.add_argument("--wires", default="float32,int4", help="values of wire-up, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="of each; the first one is cold")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a round; 0: two steps")
    parser.add_argument("--dir", type=Path, help="keep logs and runs in this directory")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a run may take")
    parser.add_argument("--quick", action="store_true", help="one tiny run instead")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what was started
    if arguments.quick:
        vars(arguments).update(_QUICK)
    if arguments.rounds < 2:
        raise UserError(f"--rounds is {arguments.rounds}: the first is cold, so at least 2")
    with tempfile.TemporaryDirectory(prefix="pilot-links-") as directory:
        where = arguments.dir.resolve() if arguments.dir else Path(directory)
        found = [
            _measure(float(rate), wire, arguments, where)
            for rate in arguments.rates.split(",")
            for wire in arguments.wires.split(",")
        ]
    print(json.dumps({"cores": os.cpu_count(), "runs": found}))


def _measure(mbit: float, wire: str, arguments: Namespace, where: Path) -> dict[str, Any]:
    stamp = f"{wire}-{mbit:g}-{int(time.time()):x}-{os.getpid()}"
    base = where / "base"
    base.mkdir(parents=True, exist_ok=True)
    length: dict[str, Any] = {"round_min_duration": arguments.seconds, "quorum": 1}
    if not arguments.seconds:
        length = {"round_steps": 2}
    size = SIZES[arguments.size]
    values = config(
        base, size, run_name=stamp, num_rounds=arguments.rounds, min_clients=1, **length
    )
    values |= {"wire-up": wire}
    _say(f"{mbit:g} Mbit/s, {wire}")
    limits = ways.Limits(arguments.limit, threading.Event())
    with ways.federation(
        where / stamp, base, values, [_SITE], site_bytes_per_s=mbit * 1e6 / 8
    ) as running:
        account = ways.measured(running, limits)
        events = list(read_events(running.run_dir / EVENTS_FILE))
    begin_s = sum(account["phases"].get(name, 0.0) for name in _BEGINNING)
    after_s = max(0.0, account["fixed_s"] - begin_s)
    return {
        "mbit_per_s": mbit,
        "wire_up": wire,
        "parameters": parameters(values),
        "seconds": arguments.seconds,
        "utilisation": account["goodput"],
        "cost_s": account["fixed_s"],
        "begin_s": round(begin_s, 3),
        "utilisation_of": {
            str(one): round(max(0.0, one - begin_s) / (one + after_s), 3) for one in _LENGTHS_S
        },
        "bytes_down": account["bytes_down_per_client"],
        "bytes_up": account["bytes_up_per_client"],
        "sending_s": [one["clients"][_SITE]["sending_s"] for one in account["rounds"]],
        "silent": sum(event["event"] == "client_silent" for event in events),
        "refused": sum(event["event"] == "reply_refused" for event in events),
        "phases": account["phases"],
    }


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    run_command_line(main)
