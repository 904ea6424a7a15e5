"""What federation costs in learning, at equal tokens and schedule.

python -m benchmarks.quality --text ../shared/data/books --out quality.jsonl --experiment outer

Trains each case of an experiment with each seed, side by side on all cores, and appends one line of JSON to
`--out` when it is done; the same command continues after an interruption. The last line is JSON: bpb after
the last outer step by case (mean over seeds), and the difference to plain training of the same seeds in percent
with its 95 % confidence interval. `--picture` writes the learning curves as one HTML page.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.quality.case import Scale
from benchmarks.quality.cases import EXPERIMENTS, PLAIN, SCALES
from benchmarks.quality.laboratory import train
from benchmarks.quality.picture import write_picture
from benchmarks.quality.text import corpus
from nanochat.common import ArgumentParser, run_command_line

# Student's t for a two-sided 95 %, by degrees of freedom
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="directory of parquet shards")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--experiment", choices=EXPERIMENTS, default="outer")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--scale", choices=SCALES, default="a")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "pilot-quality")
    parser.add_argument("--picture", type=Path, help="HTML page to write")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    cases = [case for case in EXPERIMENTS[arguments.experiment] if arguments.cases in case.name]
    corpus(arguments.text, arguments.cache, **scale.shape)  # made once, before the others need it
    done = _read(arguments.out, scale)
    wanted = [(case, seed) for seed in range(arguments.seeds) for case in cases]
    missing = [(case, seed) for case, seed in wanted if (case.name, seed) not in done]
    pool = ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"))
    with pool, arguments.out.open("a") as out, tqdm(total=len(missing), unit="run") as bar:
        runs = [
            pool.submit(train, scale, case, seed, arguments.text, arguments.cache)
            for case, seed in missing
        ]
        try:
            for run in as_completed(runs):
                found = run.result()
                done[found["case"], found["seed"]] = found
                out.write(json.dumps(found) + "\n")
                out.flush()
                bar.update()
                bar.set_postfix_str(f"{found['case']}: {found['bpb']:.4f}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = [done[case.name, seed] for case, seed in wanted]
    if arguments.picture:
        write_picture(
            arguments.picture, results, title=f"{arguments.experiment}, scale {scale.name}"
        )
    print(json.dumps({"scale": scale.name, "cases": summary(results)}))


def _read(path: Path, scale: Scale) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            run = json.loads(line)
        except ValueError:  # torn by an interruption
            print(f"a torn line of {path} is left out", file=sys.stderr)
            continue
        if run["scale"] == scale.name:
            found[run["case"], run["seed"]] = run
    return found


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """By case: bpb, and percent over plain training of the same seeds, best first."""
    by_case: dict[str, dict[int, float]] = {}
    for run in results:
        by_case.setdefault(run["case"], {})[run["seed"]] = run["bpb"]
    plain = by_case.get(PLAIN.name, {})
    found = {}
    for name, values in sorted(by_case.items(), key=lambda item: statistics.mean(item[1].values())):
        found[name] = {"bpb": round(statistics.mean(values.values()), 4), "seeds": len(values)}
        if over := [100 * (v / plain[seed] - 1) for seed, v in values.items() if seed in plain]:
            found[name]["over_plain_percent"] = round(statistics.mean(over), 2)
            if len(over) > 1 and name != PLAIN.name:
                error = statistics.stdev(over) / math.sqrt(len(over))
                found[name]["ci95_percent"] = round(_T95.get(len(over) - 1, 2.0) * error, 2)
    return found


if __name__ == "__main__":
    run_command_line(main)
