"""Where the text comes from: numbered parquet shards with a column `text`.

The validation shard is pinned by number, the last of its collection, never by its position on a
disk: a site that holds 240 shards of 1,823 must not take its highest one for validation, nor may
another site train on the one that this site validates on.

    python -m nanochat.dataset -n 240                     # FineWeb-EDU: shards 0..239, validation
    python -m nanochat.dataset -n 8 --source climbmix
    python -m nanochat.dataset --source builtin           # made here, no network
    python -m nanochat.dataset --source /data/my_shards   # only checked
    python -m nanochat.dataset -n 240 --prepare           # and packed into rows, ahead of a run
"""

import concurrent.futures
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat import builtin_corpus
from nanochat.common import ArgumentParser, UserError, get_base_dir, run_command_line
from nanochat.download import Downloader, DownloadError
from nanochat.files import file_lock

DEFAULT_SOURCE = "fineweb-edu"
TEXT_COLUMN = "text"
_HUB = "https://huggingface.co"  # $HF_ENDPOINT, the hub clients' own variable, names a mirror
_SHARD_NAME = re.compile(r"shard_(\d{5})\.parquet")
_HOPELESS_AFTER = 8  # failed shards without one success: the network is down, not a shard


@dataclass(frozen=True)
class _Collection:
    directory: str  # under the base directory
    val_shard: int  # the last one; training shards are those before it
    repository: str | None = None  # a dataset of the hub


COLLECTIONS = {
    "fineweb-edu": _Collection("base_data", 1822, "karpathy/fineweb-edu-100b-shuffle"),
    "climbmix": _Collection("base_data_climbmix", 6542, "karpathy/climbmix-400b-shuffle"),
    "builtin": _Collection("base_data_builtin", builtin_corpus.VAL_SHARD),
}


@dataclass(frozen=True)
class Source:
    """A collection of shards and the directory that holds some or all of them on this machine."""

    name: str  # a key of COLLECTIONS, or the absolute path of a directory
    directory: Path
    val_shard: int
    repository: str | None = None

    @property
    def num_train_shards(self) -> int:
        """Training shards of the whole collection, on this disk or not: numbers 0..n-1."""
        return self.val_shard

    def shard_path(self, shard: int) -> Path:
        return self.directory / f"shard_{shard:05d}.parquet"

    def present(self) -> list[int]:
        """Numbers of the shards on this disk, the validation shard included, ascending."""
        return _shard_numbers(self.directory)

    def present_train(self) -> list[int]:
        return [shard for shard in self.present() if shard < self.val_shard]

    def ensure(self, shards: Iterable[int]) -> None:
        """Raise UserError, with the command that repairs it, unless all `shards` are here."""
        wanted = sorted(set(shards))
        outside = [shard for shard in wanted if not 0 <= shard <= self.val_shard]
        if outside:
            raise UserError(
                f"{self.name} has no shard {outside[0]}: "
                f"its shards are 0..{self.val_shard}, the last one for validation"
            )
        missing = sorted(set(wanted) - set(self.present()))
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"shard {missing[0]}{more} of {self.name} is not in {self.directory}: "
                f"{self._repair(wanted)}"
            )

    def ensure_text(self) -> None:
        """Raise UserError unless a training shard and the validation shard are on this disk."""
        self.ensure([*(self.present_train()[:1] or [0]), self.val_shard])

    def manifest_sha256(self) -> str:
        """The built-in corpus's hash, which sites compare; "" for other sources (shards are hashed
        one by one as they are packed)."""
        if self.name != "builtin":
            return ""
        return builtin_corpus.manifest_sha256(self.directory)

    def _repair(self, wanted: list[int]) -> str:
        if self.repository is not None:
            train = [shard for shard in wanted if shard < self.val_shard]
            number = max(train) + 1 if train else 1
            return f"run `python -m nanochat.dataset -n {number} --source {self.name}`"
        if self.name == "builtin":
            return "run `python -m nanochat.dataset --source builtin`"
        return "put it there"


def get_source(name_or_dir: str | Path = DEFAULT_SOURCE) -> Source:
    """The source called `name_or_dir`, or the directory of one's own shards at that path.

    A directory holds `shard_00000.parquet` …; its highest-numbered shard is its validation shard.
    Raises UserError for an unknown name, and for a directory without at least two shards.
    """
    name = str(name_or_dir)
    if name in COLLECTIONS:
        entry = COLLECTIONS[name]
        directory = get_base_dir() / entry.directory
        return Source(name, directory, entry.val_shard, entry.repository)
    directory = Path(name).expanduser()
    if not directory.is_dir():
        known = ", ".join(COLLECTIONS)
        raise UserError(f"no data source {name!r}: choose one of {known}, or an existing directory")
    directory = directory.resolve()
    shards = _shard_numbers(directory)
    if len(shards) < 2:
        raise UserError(
            f"{directory} holds {len(shards)} files shard_<5 digits>.parquet: put at least two "
            "there, one to train on and one, with the highest number, to validate on"
        )
    return Source(str(directory), directory, shards[-1])


def prepare_builtin() -> Source:
    """Make the built-in corpus if it is not there yet (seconds, once a base directory)."""
    source = get_source("builtin")
    builtin_corpus.prepare(source.directory)
    return source


def iter_texts(path: Path, *, batch_documents: int = 256) -> Iterator[list[str | None]]:
    """The documents of one shard in file order, in lists; None where the file has no text.

    Raises UserError if the file is not a parquet file with a string column `text`.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=batch_documents, columns=[TEXT_COLUMN]):
                if not batch.num_columns or not _is_string(batch.schema.field(0).type):
                    raise UserError(f"{path} has no string column {TEXT_COLUMN!r}: give it one")
                yield batch.column(0).to_pylist()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: get the shard again") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is damaged or not a parquet file ({reason}): delete it and get it again"
        ) from error


def list_parquet_files(data_dir: str | Path | None = None) -> list[str]:
    """Paths of the shards in `data_dir` (default: the default source's directory), ascending."""
    directory = get_source().directory if data_dir is None else Path(data_dir)
    return [str(directory / f"shard_{shard:05d}.parquet") for shard in _shard_numbers(directory)]


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, *, source: Source | None = None
) -> Iterator[list[str]]:
    """Lists of documents of `split` ("train" or "val"): every `step`-th list from `start` on."""
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}: choose train or val")
    source = get_source() if source is None else source
    source.ensure_text()
    shards = source.present_train() if split == "train" else [source.val_shard]
    batches = (batch for shard in shards for batch in iter_texts(source.shard_path(shard)))
    for number, batch in enumerate(batches):
        if number >= start and (number - start) % step == 0:
            yield [text for text in batch if text]


def download(
    source: Source, num_train_shards: int, *, workers: int = 4, downloader: Downloader | None = None
) -> list[str]:
    """Fetch training shards 0..n-1 and the validation shard; returns a line for each that failed.

    What is on the disk already is kept, an interrupted shard is continued. One download a
    directory: a second one waits for the first. `$HF_TOKEN` is sent to the hub, and only there.
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


def check_shard(path: Path) -> None:
    """Raise ValueError unless `path` has a parquet footer and a string column `text`."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError("it is not a parquet file") from error
    index = schema.get_field_index(TEXT_COLUMN)
    if index < 0 or not _is_string(schema.field(index).type):
        raise ValueError(f"it has no string column {TEXT_COLUMN!r}")


def _is_whole(path: Path) -> bool:
    """Whether a shard is there with its footer, which stands at the end; a damaged one is named."""
    if not path.exists():
        return False
    try:
        check_shard(path)
    except ValueError as error:
        tqdm.write(f"{path.name} cannot be used, {error}: fetching it again", file=sys.stderr)
        return False
    return True


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _shard_numbers(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (_SHARD_NAME.fullmatch(entry.name) for entry in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _check_directory(source: Source) -> None:
    """Look at every shard's footer; UserError names the first bad one."""
    documents = 0
    for shard in tqdm(source.present(), desc="checking", unit="shard"):
        path = source.shard_path(shard)
        try:
            check_shard(path)
        except ValueError as error:
            raise UserError(f"{path} cannot be used, {error}: replace it") from error
        documents += pq.read_metadata(path).num_rows
    held = source.present()
    gaps = source.val_shard + 1 - len(held)
    print(
        f"{source.directory}: {len(held) - 1} training shards and validation shard "
        f"{source.val_shard}, {documents} documents"
        + (f"; {gaps} numbers below {source.val_shard} are not there" if gaps else "")
    )


def main() -> None:
    parser = ArgumentParser(prog="python -m nanochat.dataset", description="Get training text.")
    parser.add_argument(
        "-n", "--num-files", type=int, help="training shards to fetch: 0..n-1 (-1: all of them)"
    )
    parser.add_argument(
        "--source", default=DEFAULT_SOURCE, help=f"{', '.join(COLLECTIONS)}, or a directory"
    )
    parser.add_argument("-w", "--workers", type=int, default=4, help="parallel downloads")
    parser.add_argument("--prepare", action="store_true", help="pack the shards into rows")
    parser.add_argument("--tokenizer", default="tokenizer", help="for --prepare: name or path")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="for --prepare: tokens a row")
    parser.add_argument("--packing", help="for --prepare: bestfit or stream; none: the source's")
    args = parser.parse_args()

    source = get_source(args.source)
    if source.name == "builtin":
        prepare_builtin()
    if source.repository is None:
        _check_directory(source)
    elif args.num_files is not None or not args.prepare:
        _fetch(source, args.num_files, workers=args.workers)
    if args.prepare:
        shards = source.present_train()
        if args.num_files is not None and args.num_files >= 0:
            shards = [shard for shard in shards if shard < args.num_files]
        _prepare(source, shards, args.tokenizer, args.max_seq_len, args.packing)


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
            "the same command goes on where it stopped"
        )
    print(f"{source.directory}: {number} training shards and validation shard {source.val_shard}")


def _prepare(
    source: Source, shards: list[int], tokenizer_name: str, sequence_len: int, packing: str | None
) -> None:
    # these need this module
    from nanochat.dataloader import RowCache
    from nanochat.prepare_rows import prepare_rows
    from nanochat.tokenizer import get_tokenizer
    from nanochat.training_data import default_packing

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
