"""A text dataset that the `datasets` library loads, as shards of our form.

The dataset is streamed; memory holds its first documents (`Sizes.head`), later one row group. Its length
shows only at the end, so validation comes from the beginning: one tenth of the first documents becomes
the validation shard, whose number `hf_name.VAL_SHARD` is fixed, and everything after them is for
training. So neither `-n` nor a later, larger `-n` changes what a model is validated on.

A shard is written whole or not at all, and the manifest then says where in the stream the next one
begins: a killed command continues there, and the result has the same bits as if it had not been killed,
as long as the dataset itself does not change in between.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat.errors import UserError
from nanochat.files import atomic_path, atomic_write_json, file_lock
from nanochat.hf_name import VAL_SHARD, HfName
from nanochat.source import TEXT_COLUMN, Source, get_source

_FORMAT = 1
_FILE_FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
_SCHEMA = pa.schema([(TEXT_COLUMN, pa.string())])


@dataclass(frozen=True)
class Sizes:
    """Where parts end: at the first of these bounds. `head_chars` must not exceed `shard_chars`."""

    head: int = 30_000  # documents, of which one tenth is for validation
    head_chars: int = 100_000_000  # which the process holds; a tenth is some 2 million tokens
    shard_chars: int = 250_000_000  # as FineWeb-EDU's shards have
    row_group: int = 1_000  # documents


_SIZES = Sizes()


@dataclass
class _Stream:
    """The texts of a dataset, in order, and the position after the last one that was read."""

    name: HfName
    dataset: Any  # datasets.IterableDataset
    ended: bool = False

    def texts(self) -> Iterator[str]:
        """The documents that have text."""
        rows = iter(self.dataset)
        while (row := self._next(rows)) is not None:
            text = row[self.name.column]
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"column {self.name.column!r} of {self.name} holds {type(text).__name__}, not text: "
                    f"name another one as hf:{self.name.name}:{self.name.split}:COLUMN"
                )
            if text:
                yield text
        self.ended = True

    def place(self) -> dict[str, Any]:
        state: dict[str, Any] = self.dataset.state_dict()
        return state

    def _next(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return next(rows, None)
        except Exception as error:  # hub, network and file formats raise any kind
            raise UserError(
                f"reading {self.name} failed ({_first_line(error)}): repair that, then the same command "
                "continues"
            ) from error


def make_shards(name: HfName, num_shards: int | None = None, *, sizes: Sizes = _SIZES) -> Source:
    """Write the validation shard and training shards 0..num_shards-1 (None: all) that are missing.

    One command at a time per dataset: a second one waits for the first. Raises UserError if the dataset
    cannot be loaded, or has no text.
    """
    if num_shards is not None and num_shards < 1:
        raise UserError(f"-n {num_shards} is out of range: make at least one training shard")
    try:
        name.directory.mkdir(parents=True, exist_ok=True)
        with file_lock(name.directory / ".lock"):
            for unfinished in name.directory.glob(".shard_*.tmp"):  # of a killed command
                unfinished.unlink()
            _Maker(name, sizes).make(num_shards)
    except OSError as error:
        raise UserError(
            f"cannot write {name.directory} ({error.strerror or error}): make room there, then the same "
            "command continues"
        ) from error
    return get_source(str(name))


class _Maker:
    """One dataset's shards; `done` has an entry per training shard that is complete."""

    def __init__(self, name: HfName, sizes: Sizes) -> None:
        self._name, self._sizes = name, sizes
        self._source = get_source(str(name))
        manifest = name.manifest()
        if manifest.get("format") != _FORMAT or not self._path(VAL_SHARD).exists():
            manifest = {}
        whole = itertools.takewhile(
            lambda numbered: self._path(numbered[0]).exists(),
            enumerate(manifest.get("shards", [])),
        )
        self.done = [entry for _, entry in whole]
        self._complete = bool(manifest.get("complete")) and self.done == manifest["shards"]

    def make(self, num_shards: int | None) -> None:
        with tqdm(total=num_shards, desc=str(self._name), unit="shard") as bar:
            bar.update(len(self.done) if num_shards is None else min(num_shards, len(self.done)))
            if self._complete or (num_shards is not None and len(self.done) >= num_shards):
                return
            stream = _open(self._name)
            if self.done:
                stream.dataset.load_state_dict(self.done[-1]["next"])
                texts = stream.texts()
            else:
                texts = self._after_validation(stream)
            while num_shards is None or len(self.done) < num_shards:
                if not self._make_next(texts, stream, bar):
                    break

    def _after_validation(self, stream: _Stream) -> Iterator[str]:
        """Write the validation shard; returns the texts after it."""
        head, chars = [], 0
        texts = stream.texts()
        for text in texts:
            head.append(text)
            chars += len(text)
            if len(head) >= self._sizes.head or chars >= self._sizes.head_chars:
                break
        if not head:
            raise UserError(f"{self._name} has no text: name another split, or another column")
        if len(head) < 2:
            raise UserError(f"{self._name} has one document: train on at least two")
        count = -(-len(head) // 10)
        self._write(VAL_SHARD, head[:count])
        return itertools.chain(head[count:], texts)

    def _make_next(self, texts: Iterator[str], stream: _Stream, bar: "tqdm[Any]") -> bool:
        """Write the next training shard; False once the dataset is at its end."""
        written = 0

        def counted() -> Iterator[str]:
            nonlocal written
            chars = 0
            for text in texts:
                written += 1
                chars += len(text)
                yield text
                if written % self._sizes.row_group == 0:
                    bar.set_postfix_str(f"documents={self._documents() + written:,}")
                if chars >= self._sizes.shard_chars:
                    break

        first = next(reader := counted(), None)
        if first is not None:
            self._write(len(self.done), itertools.chain([first], reader))
            self.done.append({"documents": written, "next": stream.place()})
            bar.set_postfix_str(f"documents={self._documents():,}", refresh=False)
            bar.update()
        self._complete = stream.ended
        self._save()
        return not stream.ended

    def _write(self, shard: int, texts: Iterable[str]) -> None:
        reader = iter(texts)
        with (
            atomic_path(self._path(shard)) as path,
            pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        ):
            while group := list(itertools.islice(reader, self._sizes.row_group)):
                writer.write_table(pa.table([pa.array(group, pa.string())], schema=_SCHEMA))

    def _save(self) -> None:
        manifest = {
            "format": _FORMAT,
            "source": str(self._name),
            "shards": self.done,
            "complete": self._complete,
        }
        atomic_write_json(self._name.manifest_path, manifest)

    def _documents(self) -> int:
        return sum(entry["documents"] for entry in self.done)

    def _path(self, shard: int) -> Path:
        return self._source.shard_path(shard)


def _open(name: HfName) -> _Stream:
    """The dataset as a stream of its text column; UserError if there is no such thing."""
    import datasets  # slow to import, and only this needs it

    path = name.local_path
    try:
        if path is not None and path.is_file():
            kind = _FILE_FORMATS.get(path.suffix.lower())
            if kind is None:
                raise UserError(
                    f"{path} is of no known kind: use one of {', '.join(_FILE_FORMATS)}, or a directory"
                )
            loaded = datasets.load_dataset(
                kind, data_files=str(path), split=name.split, streaming=True
            )
        else:
            loaded = datasets.load_dataset(str(path or name.name), split=name.split, streaming=True)
        columns = loaded.column_names or list(next(iter(loaded), {}))
    except UserError:
        raise
    except FileNotFoundError as error:  # not on the hub, or an empty directory
        raise UserError(
            f"there is no dataset {name.name!r} on the hub, and no data in a directory of that name: "
            "check the name, and set HF_TOKEN if it is a private one"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"the hub cannot be reached for {name.name!r} ({_first_line(error)}): connect this machine, "
            "or name a local dataset"
        ) from error
    except Exception as error:  # datasets passes on what its builders raise
        raise UserError(
            f"{name} cannot be loaded ({_first_line(error)}): name it as hf:NAME:SPLIT:COLUMN"
        ) from error
    if not columns:
        raise UserError(f"{name} is empty: name another split or dataset")
    if name.column not in columns:
        raise UserError(
            f"{name} has no column {name.column!r}, only {', '.join(columns)}: name the one with the "
            f"text as hf:{name.name}:{name.split}:COLUMN"
        )
    return _Stream(name, loaded.select_columns([name.column]))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
