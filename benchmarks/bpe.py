"""Train the same vocabulary on the same text with our rustbpe, PyPI's rustbpe and HF tokenizers.

python -m benchmarks.bpe --text builtin --vocab 8192,32768,65536 --threads 1,2
python -m benchmarks.bpe --text ../shared/data/books --repeat 3 --out bpe.json

`--text` is a text file, a directory of parquet shards with a column `text`, or `builtin`. It is
written once to a plain file, which every trainer reads in a process of its own (`bpe_child.py`): the
peak memory is that of Python and the trainer. The rounds of the trainers are interleaved, and each
figure is the median of `--repeat` rounds. On a busy machine trust ratios more than seconds, and CPU
seconds (of all threads) more than either.

The trainers to compare with are fetched once, into `benchmarks/` of the base directory. A sentence
says so when one cannot be had; its ratios are null then. Lines are JSON, one per measurement; the
last one holds the ratios (theirs to ours: above 1, ours is better).
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.bpe_child import LENGTH_BYTES, NUM_BYTES
from nanochat.builtin import prepare_builtin
from nanochat.common import ArgumentParser, get_base_dir, run_command_line
from nanochat.errors import UserError
from nanochat.source import parquets_iter_batched

REQUIREMENTS = {"rustbpe": "rustbpe>=0.1,<0.2", "tokenizers": "tokenizers>=0.21"}
RATIOS = {"ratio": "total_s", "cpu_ratio": "cpu_s", "rss_ratio": "peak_rss_bytes"}
CURVE_MERGES = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
DOCUMENT_CHARS = 4096  # of a plain text file, which has no documents of its own
INSTALL_TIMEOUT_S = 300


@dataclass(frozen=True)
class Text:
    """Documents in a file, each behind its length."""

    path: Path
    num_bytes: int
    num_documents: int


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.bpe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", default="builtin", help="a file, a directory of shards, builtin")
    parser.add_argument("--vocab", type=numbers, default=[8192, 32768, 65536])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--repeat", type=int, default=1, help="rounds, of which medians are taken")
    parser.add_argument(
        "--trainers", default="ours,rustbpe,tokenizers", help="ours is always included"
    )
    parser.add_argument("--no-curve", action="store_true", help="skip the curve over merges")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file, too")
    args = parser.parse_args()

    wanted = args.trainers.split(",")
    paths: dict[str, Path | None] = {"ours": None}
    paths |= {name: fetch(name) for name in REQUIREMENTS if name in wanted}
    report: dict[str, Any] = {"text": args.text, "cores": os.cpu_count(), "measurements": []}
    with tempfile.TemporaryDirectory(prefix="bpe-") as directory:
        text = write_documents(read_documents(args.text), Path(directory) / "documents")
        report |= {"text_bytes": text.num_bytes, "documents": text.num_documents}
        report["ratios"] = []
        for vocab in args.vocab:
            for threads in args.threads:
                options = {"vocab": vocab, "threads": threads, "repeat": args.repeat}
                rows, summary = measure(text, paths, **options)
                for row in rows:
                    print(json.dumps(row), flush=True)
                report["measurements"] += rows
                report["ratios"].append(summary)
        if not args.no_curve:
            options = {"vocab": max(args.vocab), "threads": args.threads[-1]}
            report["curve"] = curve(text, repeat=args.repeat, **options)
            print(json.dumps({"curve": report["curve"]}), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in ("text", "text_bytes", "ratios")}))


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def fetch(name: str) -> Path | None:
    """The directory with the trainer `name`, installed there if it is missing; None without it.

    PyPI's rustbpe has the name of ours, so neither may be installed beside the other.
    """
    directory = get_base_dir() / "benchmarks" / name
    if (directory / name).is_dir():
        return directory
    if uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        install = [sys.executable, "-m", "pip", "install", "--quiet"]
    partial = directory.with_name(f"{name}.{os.getpid()}")
    command = [*install, "--no-deps", "--target", str(partial), REQUIREMENTS[name]]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        print(
            f"{REQUIREMENTS[name]} cannot be installed (no network?), so it is left out: "
            f"{lines[-1].strip() if lines else error}",
            file=sys.stderr,
        )
        return None
    partial.rename(directory)
    return directory


def read_documents(source: str) -> Iterator[str]:
    if source == "builtin":
        for batch in parquets_iter_batched("train", source=prepare_builtin()):
            yield from batch
        return
    path = Path(source)
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise UserError(f"{path} holds no *.parquet: name a directory of shards, or a file")
        for shard in shards:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(batch_size=256, columns=["text"]):
                    yield from filter(None, batch.column(0).to_pylist())
    elif path.is_file():
        with path.open(encoding="utf-8", newline="") as lines:
            document: list[str] = []
            left = DOCUMENT_CHARS
            for line in lines:
                document.append(line)
                left -= len(line)
                if left <= 0:
                    yield "".join(document)
                    document, left = [], DOCUMENT_CHARS
            yield "".join(document)
    else:
        raise UserError(f"there is no text {source}: name a file, a directory of shards, builtin")


def write_documents(documents: Iterator[str], path: Path) -> Text:
    num_bytes = num_documents = 0
    with path.open("wb") as file:
        for document in documents:
            data = document.encode("utf-8")
            file.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
            num_bytes += len(data)
            num_documents += 1
    return Text(path, num_bytes, num_documents)


def measure(
    text: Text, paths: dict[str, Path | None], *, vocab: int, threads: int, repeat: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each trainer, the medians of `repeat` rounds; and what they say of ours."""
    names = [name for name, path in paths.items() if name == "ours" or path]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    tokens: dict[str, list[str]] = {}
    for _ in range(repeat):
        for name in names:
            result, tokens[name] = run_child(name, text, vocab, threads, path=paths[name])
            rounds[name].append(result)
    rows = {name: medians(results, text) for name, results in rounds.items()}
    ours = rows["ours"]
    summary: dict[str, Any] = {"vocab": vocab, "threads": threads}
    for name in REQUIREMENTS:
        theirs = rows.get(name)
        for ratio, key in RATIOS.items():
            summary[f"{ratio}_{name}"] = theirs and round(theirs[key] / ours[key], 2)
    # The merges of PyPI's rustbpe must be ours. HF numbers the bytes otherwise, and so breaks ties
    # otherwise: what can be compared are the first difference and the share of tokens in common.
    summary["merges_equal"] = tokens["ours"] == tokens["rustbpe"] if "rustbpe" in tokens else None
    if "tokenizers" in tokens:
        pairs = zip(tokens["ours"], tokens["tokenizers"], strict=False)
        same = [ours == theirs for ours, theirs in pairs]
        summary["tokenizers_first_difference"] = same.index(False) if False in same else None
        common = set(tokens["ours"]) & set(tokens["tokenizers"])
        summary["tokenizers_common_share"] = round(len(common) / max(1, len(tokens["ours"])), 4)
    about = {"vocab": vocab, "threads": threads}
    return [{"trainer": name} | about | row for name, row in rows.items()], summary


def medians(results: list[dict[str, Any]], text: Text) -> dict[str, Any]:
    row = results[0].copy()
    for key in ("total_s", "counting_s", "merging_s", "cpu_s"):
        row[key] = round(statistics.median(result[key] for result in results), 3)
    row["peak_rss_bytes"] = int(statistics.median(result["peak_rss_bytes"] for result in results))
    return row | {"mb_per_s": round(text.num_bytes / 1e6 / row["total_s"], 2)}


def run_child(
    name: str, text: Text, vocab: int, threads: int, *, path: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """One training in a process of its own; `path` is put in front of what it imports from."""
    tokens = text.path.with_name("tokens")
    child = Path(__file__).with_name("bpe_child.py")
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    if path:
        environ["PYTHONPATH"] = str(path)
    arguments = [child, name, text.path, vocab, threads, tokens]
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name} failed at a vocabulary of {vocab}: its message is above")
    return json.loads(done.stdout.splitlines()[-1]), tokens.read_text().split()


def curve(text: Text, *, vocab: int, threads: int, repeat: int) -> list[dict[str, Any]]:
    """Our seconds in merging, by number of merges up to those of `vocab`."""
    points = []
    most = vocab - NUM_BYTES
    for merges in [*(count for count in CURVE_MERGES if count < most), most]:
        results = [
            run_child("ours", text, NUM_BYTES + merges, threads, path=None)[0]
            for _ in range(repeat)
        ]
        merging_s = statistics.median(result["merging_s"] for result in results)
        points.append({"merges": results[0]["merges"], "merging_s": round(merging_s, 4)})
    return points


if __name__ == "__main__":
    run_command_line(main)
