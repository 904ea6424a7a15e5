"""Where the text comes from: numbered parquet shards with a column `text`.

The validation shard is pinned by number, the last of its collection, never by its position on a
disk: a site that holds 240 shards of 1,823 must not take its highest one for validation, nor may
another site train on the one that this site validates on.
"""

import itertools
import logging
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
_LOG = logging.getLogger(__name__)
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
                f"{self.repair(wanted)}"
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

    def repair(self, wanted: list[int]) -> str:
        """The command that gets the shards `wanted`, or what to do instead."""
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


def iter_texts(
    path: Path, *, batch_documents: int = 256, repaired: list[int] | None = None
) -> Iterator[list[str | None]]:
    """The documents of one shard in file order, in lists; None where the file has no text.

    Bytes that are not UTF-8 become U+FFFD. `repaired` gets the numbers of such rows (from 0); without
    it a warning says how many there are. Raises UserError, with the row, if the file cannot be read or
    is not a parquet file with a string column `text`.
    """
    found: list[int] = [] if repaired is None else repaired
    row = 0
    try:
        _open_once(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=batch_documents, columns=[TEXT_COLUMN]):
                if reason := _why_no_text(batch.schema):
                    raise UserError(f"{path} cannot be used, {reason}: give it one")
                yield _texts_of(batch.column(0), row, found)
                row += batch.num_rows
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: get the shard again") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        behind = f" behind row {row - 1}" if row else ""
        if "UTF8" in reason:  # Arrow's reader checks the rarer kinds of string columns itself
            raise UserError(
                f"{path} has text{behind} that is not UTF-8, in a column of a type in which it cannot "
                "be repaired: write it as plain strings"
            ) from error
        raise UserError(
            f"{path} is damaged{behind} or not a parquet file ({reason}): delete it and get it again"
        ) from error
    finally:
        if found and repaired is None:
            _LOG.warning("%s", repaired_rows(path, len(found), found[0]))


def repaired_rows(path: Path, count: int, first: int) -> str:
    """What `iter_texts` did to a shard, as a sentence."""
    return (
        f"{path}: {count} documents are not UTF-8, the first one is row {first} (from 0): "
        "U+FFFD stands for their wrong bytes"
    )


def _texts_of(column: pa.Array, first_row: int, repaired: list[int]) -> list[str | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        texts: list[str | None] = column.to_pylist()
        return texts
    except UnicodeDecodeError:  # nothing checks what a writer calls a string
        texts = []
    for row, data in enumerate(column.cast(pa.large_binary()).to_pylist(), first_row):
        try:
            texts.append(None if data is None else data.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(data.decode("utf-8", "replace"))
            repaired.append(row)
    return texts


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
        _open_once(path)
    except (UserError, FileNotFoundError) as error:
        raise ValueError(f"it cannot be opened ({_system_reason(error)})") from error
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError("it is not a parquet file") from error
    if reason := _why_no_text(schema):
        raise ValueError(reason)


def _open_once(path: Path) -> None:
    """Raise UserError where the system does not let us read `path` (FileNotFoundError without it)."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): make it readable, or put another one there"
        ) from error


def _system_reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(getattr(cause, "strerror", None) or cause)


def _why_no_text(schema: pa.Schema) -> str:
    """Why there is no text in such a table; "" if there is."""
    index = schema.get_field_index(TEXT_COLUMN)
    if index < 0:
        return f"it has no string column {TEXT_COLUMN!r}"
    kind = schema.field(index).type
    return (
        "" if _is_string(kind) else f"it has no string column {TEXT_COLUMN!r} (its type is {kind})"
    )


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # how some writers store what repeats
        return _is_string(kind.value_type)
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _shard_numbers(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    try:
        matches = [_SHARD_NAME.fullmatch(entry.name) for entry in directory.iterdir()]
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror}): make it readable"
        ) from error
    return sorted(int(match[1]) for match in matches if match)


def number_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as people write them: `0..3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def default_packing(source: Source) -> str:
    """Stream for the small built-in corpus, of which best-fit would discard most; else best-fit."""
    return "stream" if source.name == "builtin" else "bestfit"
