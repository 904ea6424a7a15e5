"""Getting training text: the command that fetches, makes, checks and packs shards.

python -m nanochat.dataset -n 240                     # FineWeb-EDU: shards 0..239, validation
python -m nanochat.dataset -n 8 --source climbmix
python -m nanochat.dataset --source builtin           # made here, no network
python -m nanochat.dataset --source /data/my_shards   # only checked, every row
python -m nanochat.dataset -n 8 --source hf:NAME      # any text dataset of the `datasets` library
python -m nanochat.dataset -n 240 --prepare           # and packed into rows, ahead of a run
"""

import concurrent.futures
import os
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat.builtin import prepare_builtin
from nanochat.common import ArgumentParser, run_command_line
from nanochat.download import Downloader, DownloadError
from nanochat.errors import UserError
from nanochat.files import file_lock
from nanochat.hf_name import PREFIX, HfName
from nanochat.hf_shards import make_shards
from nanochat.rows.cache import RowCache
from nanochat.rows.prepare import prepare_rows
from nanochat.source import (
    COLLECTIONS,
    DEFAULT_SOURCE,
    Source,
    check_shard,
    default_packing,
    get_source,
    iter_texts,
    list_parquet_files,
    number_ranges,
    parquets_iter_batched,
    repaired_rows,
)
from nanochat.tokenizer import get_tokenizer

__all__ = [  # upstream's names for what stands in source.py
    "Source",
    "download",
    "get_source",
    "list_parquet_files",
    "parquets_iter_batched",
]

_HUB = "https://huggingface.co"  # $HF_ENDPOINT, the hub clients' own variable, names a mirror
_HOPELESS_AFTER = 8  # failed shards without one success: the network is down, not a shard


def download(
    source: Source, num_train_shards: int, *, workers: int = 4, downloader: Downloader | None = None
) -> list[str]:
    """Fetch training shards 0..n-1 and the validation shard; returns a line for each that failed.

    Keeps what is on the disk already and continues an interrupted shard. One download per
    directory at a time: a second one waits. `$HF_TOKEN` is sent to the hub, and only there.
    """
    assert source.repository is not None
    downloader = downloader or Downloader()
    if token := os.environ.get("HF_TOKEN"):
        downloader = replace(downloader, headers={"Authorization": f"Bearer {token}"})
    source.directory.mkdir(parents=True, exist_ok=True)
    with file_lock(source.directory / ".download.lock"):
        wanted = [*range(num_train_shards), source.val_shard]
        missing = [path for path in map(source.shard_path, wanted) if not _is_whole(path)]
        with tqdm(total=len(wanted), desc=source.name, unit="shard") as bar:
            bar.update(len(wanted) - len(missing))
            return _fetch_all(source.repository, missing, downloader, workers=workers, bar=bar)


def _fetch_all(
    repository: str, paths: list[Path], downloader: Downloader, *, workers: int, bar: tqdm
) -> list[str]:
    endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    base_url = f"{endpoint}/datasets/{repository}/resolve/main"
    failures: list[str] = []
    fetched = 0
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        names = {
            pool.submit(
                downloader.fetch, f"{base_url}/{path.name}", path, check=check_shard
            ): path.name
            for path in paths
        }
        try:
            for future in concurrent.futures.as_completed(names):
                try:
                    future.result()
                except DownloadError as error:
                    failures.append(f"{names[future]}: {error}")
                    tqdm.write(f"error: {failures[-1]}", file=sys.stderr)
                    if not fetched and len(failures) >= _HOPELESS_AFTER:
                        untried = len(names) - len(failures)
                        tqdm.write(f"error: {untried} shards were not tried", file=sys.stderr)
                        break
                else:
                    fetched += 1
                    bar.update()
        finally:  # also on Ctrl-C: the threads leave at their next chunk
            downloader.stop.set()
            pool.shutdown(cancel_futures=True)
    return failures


def _is_whole(path: Path) -> bool:
    """Whether a shard is there with its footer, which is written last; reports a damaged one."""
    if not path.exists():
        return False
    try:
        check_shard(path)
    except ValueError as error:
        tqdm.write(f"{path.name} cannot be used, {error}: fetching it again", file=sys.stderr)
        return False
    return True


def _check_directory(source: Source, *, footers_only: bool) -> None:
    """Read every shard to its end; a line for each that is bad, and UserError with the first.

    `footers_only` where all is about to be read anyway.
    """
    documents, failures = 0, []
    for shard in tqdm(source.present(), desc="checking", unit="shard"):
        path = source.shard_path(shard)
        repaired: list[int] = []
        try:
            check_shard(path)
            if footers_only:
                documents += pq.read_metadata(path).num_rows
            else:
                documents += sum(map(len, iter_texts(path, repaired=repaired)))
        except ValueError as error:
            failures.append(f"{path} cannot be used, {error}: replace it")
        except UserError as error:
            failures.append(str(error))
        if repaired:
            tqdm.write(repaired_rows(path, len(repaired), repaired[0]), file=sys.stderr)
    for failure in failures[1:]:
        tqdm.write(f"error: {failure}", file=sys.stderr)
    if failures:
        raise UserError(failures[0])
    held = source.present()
    gaps = sorted(set(range(source.val_shard)) - set(held))
    print(
        f"{source.directory}: {len(held) - 1} training shards and validation shard "
        f"{source.val_shard}, {documents} documents"
        + (f"; {len(gaps)} numbers are missing: {number_ranges(gaps)}" if gaps else "")
    )


def main() -> None:
    parser = ArgumentParser(prog="python -m nanochat.dataset", description="Get training text.")
    parser.add_argument(
        "-n", "--num-files", type=int, help="training shards to get: 0..n-1 (-1: all)"
    )
    parser.add_argument(
        "--source",
        default=DEFAULT_SOURCE,
        help=f"{', '.join(COLLECTIONS)}, hf:NAME, or a directory",
    )
    parser.add_argument("-w", "--workers", type=int, default=4, help="parallel downloads")
    parser.add_argument("--prepare", action="store_true", help="pack the shards into rows")
    parser.add_argument("--tokenizer", default="tokenizer", help="for --prepare: name or path")
    parser.add_argument(
        "--max-seq-len", type=int, default=2048, help="for --prepare: tokens per row"
    )
    parser.add_argument("--packing", help="for --prepare: bestfit or stream; none: the source's")
    args = parser.parse_args()

    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}: it must be at least 1")
    source = get_source(args.source)
    if source.name == "builtin":
        prepare_builtin()
    wanted = args.num_files is not None or not args.prepare  # else: only pack what is here
    if source.name.startswith(PREFIX):
        source = _make(args.source, args.num_files) if wanted else source
    elif source.repository is None:
        _check_directory(source, footers_only=args.prepare)
    elif wanted:
        _fetch(source, args.num_files, workers=args.workers)
    if args.prepare:
        shards = source.present_train()
        if args.num_files is not None and args.num_files >= 0:
            shards = [shard for shard in shards if shard < args.num_files]
        _prepare(source, shards, args.tokenizer, args.max_seq_len, args.packing)


def _make(name: str, num_files: int | None) -> Source:
    source = make_shards(HfName.parse(name), None if num_files == -1 else num_files)
    made = len(source.present_train())
    whole = ", the whole dataset" if source.train_shards == made else ""
    print(
        f"{source.directory}: {made} training shards{whole} and validation shard {source.val_shard}"
    )
    return source


def _fetch(source: Source, num_files: int | None, *, workers: int) -> None:
    most = source.num_train_shards
    if num_files is None:
        raise UserError(
            f"say how many of the {most} training shards of {source.name} to fetch: "
            "-n 240 (-1 for all)"
        )
    number = most if num_files == -1 else num_files
    if not 0 <= number <= most:
        raise UserError(f"-n {number} is out of range: {source.name} has {most} training shards")
    failures = download(source, number, workers=workers)
    if failures:
        raise UserError(
            f"{len(failures)} shards are missing in {source.directory}, see above: "
            "the same command continues where it stopped"
        )
    print(f"{source.directory}: {number} training shards and validation shard {source.val_shard}")


def _prepare(
    source: Source, shards: list[int], tokenizer_name: str, sequence_len: int, packing: str | None
) -> None:
    source.ensure_text()
    cache = RowCache(
        source,
        get_tokenizer(tokenizer_name),
        sequence_len=sequence_len,
        packing=packing or default_packing(source),
    )
    try:
        failures = prepare_rows(cache, [source.val_shard, *shards])
    finally:
        cache.close()
    if failures:
        raise UserError(
            f"{len(failures)} shards of {source.name} are not packed, see above: "
            "get them again, then the same command packs what is left"
        )
    print(
        f"{cache.directory}: rows of {sequence_len} tokens of {len(shards)} training shards and "
        f"the validation shard, packed as {cache.packing}"
    )


if __name__ == "__main__":
    run_command_line(main)
