"""`python -m benchmarks.chaos`: a disturbed run, an undisturbed one, and their comparison as JSON.

The run is as long as what an undisturbed run trains in 0.7 times the minutes (measured first, unless
`--tokens` is given), so that faults strike nearly until its end. The undisturbed run has the same seed and
tokens, and runs at the same time on the same machine: on a shared one no two minutes are alike.

The last line is JSON. `violations` is a list of sentences; the exit code is 1 if there are any.
`throughput_ratio` compares tokens per second, until the first commit after the last fault, with those of the
undisturbed run, divided by the share of client-seconds in which a client and all that it depends on were up;
`recovery_*` are seconds from a fault to the next commit with work of the client that was hit (of any client,
if the fault hit none in particular).
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.chaos import checker, faults, tour
from benchmarks.chaos.tour import Outcome, Tour
from pilot.config import DEFAULTS

STOP = threading.Event()


def main() -> int:
    # SIGTERM and SIGHUP, too, end everything in good order
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: STOP.set())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="minutes in which faults strike"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=12.0, help="seconds per fault")
    parser.add_argument("--sites", type=int, default=3, help="number of clients")
    parser.add_argument(
        "--tokens", type=int, default=0, help="tokens to train on; 0: chosen from the minutes"
    )
    parser.add_argument(
        "--round-tokens", type=int, default=49152, help="tokens at which a round ends"
    )
    parser.add_argument(
        "--batch-of",
        choices=tuple(checker.BPB_TOLERANCE),
        default=str(DEFAULTS["batch-of"]),
        help="whose total-batch-size is; how far bpb may be off depends on it",
    )
    parser.add_argument(
        "--kinds", default="", help="comma-separated kinds of faults: only these, in this order"
    )
    parser.add_argument(
        "--undisturbed",
        choices=("together", "before", "skip"),
        default="together",
        help="when to do the undisturbed run",
    )
    parser.add_argument(
        "--dir", type=Path, help="directory for logs and runs (default: a temporary one)"
    )
    arguments = parser.parse_args()
    if arguments.dir is not None:
        return _compare(arguments, arguments.dir.resolve())
    with tempfile.TemporaryDirectory(prefix="pilot-chaos-") as directory:
        return _compare(arguments, Path(directory))


def _compare(arguments: argparse.Namespace, directory: Path) -> int:
    sites = tuple(f"site-{letter}" for letter in "abcdefgh"[: arguments.sites])
    stamp = f"{int(time.time()):x}-{os.getpid()}"
    tokens = arguments.tokens or _tokens(arguments, sites, directory, stamp)
    plan = faults.plan(
        arguments.seed,
        duration_s=60 * arguments.minutes,
        every_s=arguments.every,
        sites=sites,
        kinds=arguments.kinds.split(",") if arguments.kinds else None,
    )

    def one(name: str) -> Outcome:
        spec = Tour(
            name=f"{name}-{stamp}",
            sites=sites,
            total_tokens=tokens,
            round_tokens=arguments.round_tokens,
            plan=tuple(plan) if name == "disturbed" else (),
            timeout_s=600.0 + 60 * arguments.minutes,
            more={"batch-of": arguments.batch_of},
        )
        _say(f"{spec.name}: {tokens} tokens on {len(sites)} clients")
        outcome = _run(spec, directory)
        (directory / f"{spec.name}.outages.jsonl").write_text(tour.journal(outcome))
        _say(json.dumps({name: tour.figures(outcome, None, sites=sites)}))
        return outcome

    undisturbed: Outcome | None = None
    if arguments.undisturbed == "together":
        with ThreadPoolExecutor() as pool:
            calm, struck = pool.submit(one, "undisturbed"), pool.submit(one, "disturbed")
            undisturbed, disturbed = calm.result(), struck.result()
    else:
        if arguments.undisturbed == "before":
            undisturbed = one("undisturbed")
            if STOP.is_set():
                return 1
        disturbed = one("disturbed")
    figures = tour.figures(disturbed, undisturbed, sites=sites, batch_of=arguments.batch_of)
    print(json.dumps(figures), flush=True)
    return 1 if figures["violations"] else 0


def _run(spec: Tour, directory: Path) -> Outcome:
    """Run a tour in a base directory of its own: within one, names of nodes are unique."""
    base = directory / f"{spec.name}.base"
    tour.prepare(base)
    return tour.run(spec, directory / spec.name, base, STOP)


def _tokens(
    arguments: argparse.Namespace, sites: tuple[str, ...], directory: Path, stamp: str
) -> int:
    """The tokens that an undisturbed run would train on in 0.7 times the minutes."""
    spec = Tour(
        name=f"rate-{stamp}",
        sites=sites,
        total_tokens=6 * arguments.round_tokens,
        round_tokens=arguments.round_tokens,
        more={"batch-of": arguments.batch_of},
    )
    outcome = _run(spec, directory)
    if not outcome.tokens:
        sys.exit(f"the federation does not train (logs in {directory}): {outcome.violations}")
    rounds = 0.7 * 60 * arguments.minutes * outcome.tokens_per_s / arguments.round_tokens
    return max(2, round(rounds)) * arguments.round_tokens


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
