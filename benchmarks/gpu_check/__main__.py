"""Checks and measures Pilot on this machine's first GPU; see README.md beside this file.

python -m benchmarks.gpu_check --seconds 460 [--out results.jsonl]
python -m benchmarks.gpu_check --device cpu --tiny
python -m benchmarks.gpu_check --only d20-b32 --variants head=eager,fused sdpa=flash,cudnn
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_check.plan import checks, parse_variants
from benchmarks.gpu_check.runner import Outcome, run_all
from benchmarks.gpu_check.table import table
from benchmarks.gpu_check.verdict import Setup


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: does the code run?")
    parser.add_argument("--seconds", type=float, default=460.0, help="after which nothing starts")
    parser.add_argument("--only", default="", metavar="NAME,…", help="these checks")
    parser.add_argument("--skip", default="", metavar="NAME,…", help="not these checks")
    parser.add_argument(
        "--variants", nargs="*", default=[], metavar="KEY=VALUE,…", help="of the training step"
    )
    parser.add_argument("--out", type=Path, help="directory for results.jsonl, table and logs")
    arguments = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that no check outlives this process
    if (
        arguments.tiny
    ):  # at these sizes more threads only wait for one another, and that is work, too
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    directory = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    setup = Setup(device=arguments.device, tiny=arguments.tiny, directory=directory)
    out = arguments.out or directory
    out.mkdir(parents=True, exist_ok=True)
    try:
        chosen = checks(_names(arguments.only), parse_variants(arguments.variants))
    except ValueError as error:
        parser.error(str(error))
    chosen = [check for check in chosen if check.name not in _names(arguments.skip)]
    with (out / "results.jsonl").open("w", encoding="utf-8") as results:

        def tell(outcome: Outcome) -> None:
            print(outcome.line(), flush=True)
            print(outcome.line(), file=results, flush=True)

        outcomes = run_all(chosen, setup, seconds=arguments.seconds, tell=tell)
    text = table(outcomes)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    if arguments.out:
        with (out / "logs.txt").open("w", encoding="utf-8", errors="replace") as logs:
            for path in sorted((directory / "logs").glob("*.log")):
                logs.write(
                    f"== {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n"
                )
        shutil.rmtree(directory, ignore_errors=True)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
