"""Where the text comes from: numbered parquet shards with a column `text`.

The validation shard is pinned by number, the last of its collection, never by its position on a
disk: a site that holds 240 shards of 1,823 must not take its highest one for validation, nor may
another site train on the one that this site validates on.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import builtin_corpus, hf_name
from nanochat.common import get_base_dir, user_path
from nanochat.errors import UserError
from nanochat.hf_name import HfName

DEFAULT_SOURCE = "fineweb-edu"
TEXT_COLUMN = "text"
_SHARD_NAME = re.compile(r"shard_(\d{5})\.parquet")


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

    name: str  # a key of COLLECTIONS, `hf:…`, or the absolute path of a directory
    directory: Path
    val_shard: int
    repository: str | None = None
    train_shards: int | None = None  # None: all numbers below val_shard

    @property
    def num_train_shards(self) -> int:
        """Training shards of the whole collection, on this disk or not: numbers 0..n-1."""
        return self.val_shard if self.train_shards is None else self.train_shards

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
        if self.repository is not None or self.name.startswith(hf_name.PREFIX):
            train = [shard for shard in wanted if shard < self.val_shard]
            number = max(train) + 1 if train else 1
            return f"run `python -m nanochat.dataset -n {number} --source {self.name}`"
        if self.name == "builtin":
            return "run `python -m nanochat.dataset --source builtin`"
        return "put it there"


def get_source(name_or_dir: str | Path = DEFAULT_SOURCE) -> Source:
    """The source called `name_or_dir`, or the directory of one's own shards at that path.

    `hf:NAME[:SPLIT[:COLUMN]]` is the directory that `nanochat.hf_shards` fills. A directory of one's own
    holds `shard_00000.parquet` …; its highest-numbered shard is its validation shard.
    Raises UserError for an unknown name, and for a directory without at least two shards.
    """
    name = str(name_or_dir)
    if name in COLLECTIONS:
        entry = COLLECTIONS[name]
        directory = get_base_dir() / entry.directory
        return Source(name, directory, entry.val_shard, entry.repository)
    if name.startswith(hf_name.PREFIX):
        hf = HfName.parse(name)
        total = hf.num_train_shards()
        return Source(str(hf), hf.directory, hf_name.VAL_SHARD, train_shards=total)
    directory = user_path(name)
    if not directory.is_dir():
        known = ", ".join(COLLECTIONS)
        raise UserError(
            f"no data source {name!r}: choose one of {known}, hf:NAME, or an existing directory"
        )
    directory = directory.resolve()
    shards = _shard_numbers(directory)
    if len(shards) < 2:
        raise UserError(
            f"{directory} holds {len(shards)} files shard_<5 digits>.parquet: put at least two "
            "there, one to train on and one, with the highest number, to validate on"
        )
    return Source(str(directory), directory, shards[-1])


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


def cropped(batches: Iterable[Sequence[str]], *, max_chars: int, doc_cap: int) -> Iterator[str]:
    """The first `doc_cap` characters of each document, until `max_chars` characters are reached.

    Long documents would give their own words too much weight; `doc_cap` 0 crops nothing.
    """
    left = max_chars
    for text in itertools.chain.from_iterable(batches):
        if left <= 0:
            return
        document = text[:doc_cap] if doc_cap else text
        left -= len(document)
        yield document


def check_shard(path: Path) -> None:
    """Raise ValueError unless `path` has a parquet footer and a string column `text`."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError("it is not a parquet file") from error
    index = schema.get_field_index(TEXT_COLUMN)
    if index < 0 or not _is_string(schema.field(index).type):
        raise ValueError(f"it has no string column {TEXT_COLUMN!r}")


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _shard_numbers(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (_SHARD_NAME.fullmatch(entry.name) for entry in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def default_packing(source: Source) -> str:
    """Stream for the small built-in corpus, of which best-fit would discard most; else best-fit."""
    return "stream" if source.name == "builtin" else "bestfit"
