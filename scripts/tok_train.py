"""Train the tokenizer on the training shards that are on this disk.

python -m scripts.tok_train --max-chars=4000000000 --vocab-size=65536
python -m scripts.tok_train --source builtin --vocab-size 4096 --tokenizer tokenizer_tiny

The tokenizer is a function of the shards read, `--max-chars`, `--doc-cap` and `--vocab-size`, on any
number of threads. Which shards those are is written down before the work, in `training.json` beside
the tokenizer: the same command after an interruption takes the same ones, even if more have arrived
since. Sites that hold different numbers of shards say `--num-shards` to get the same tokenizer.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat import tokenizer as tokenizer_module
from nanochat.builtin import open_source
from nanochat.common import ArgumentParser, run_command_line
from nanochat.errors import UserError
from nanochat.files import atomic_write_json
from nanochat.source import (
    COLLECTIONS,
    DEFAULT_SOURCE,
    TEXT_COLUMN,
    Source,
    check_shard,
    cropped,
    iter_texts,
    number_ranges,
)
from nanochat.tokenizer import PICKLE_FILE, TOKENIZER_FILE, RustBPETokenizer, tokenizer_dir

CHOICE_FILE = "training.json"
MOST_THREADS = 1024  # rustbpe's limit


@dataclass(frozen=True)
class Options:
    """What the user says; 0 shards are all that are here, `doc_cap` 0 crops nothing."""

    max_chars: int
    doc_cap: int
    vocab_size: int
    num_shards: int = 0

    def __post_init__(self) -> None:
        tokenizer_module.check_vocab_size(self.vocab_size)
        if self.max_chars < 1 or self.doc_cap < 0 or self.num_shards < 0:
            raise UserError(
                "max-chars must be at least 1, doc-cap at least 0 (0 crops nothing) "
                "and num-shards at least 0 (0 takes all)"
            )


@dataclass(frozen=True)
class Choice:
    """The text that a tokenizer is trained on: equal choices give equal tokenizers."""

    source: str
    options: Options
    shard_bytes: dict[str, int]  # file size by shard number (a string, as in JSON), in any order

    @property
    def shards(self) -> list[int]:
        """In the order of reading, on which depends what `max_chars` leaves out."""
        return sorted(int(shard) for shard in self.shard_bytes)


def choose(source: Source, options: Options, directory: Path) -> Choice:
    """Which shards to train on: those that an interrupted training with the same options chose.

    Raises UserError when shards are missing, or are no longer those that were chosen.
    """
    before = _unfinished(directory)
    if before and (before.source, before.options) == (source.name, options):
        source.ensure(before.shards)
        if _shard_bytes(source, before.shards) != before.shard_bytes:
            path = directory / CHOICE_FILE
            raise UserError(
                f"{source.directory} does not hold the shards that {path} names: "
                f"delete {path} to train on what is there now"
            )
        print(f"continuing with the {len(before.shards)} shards chosen before the interruption")
        return before
    if options.num_shards > source.num_train_shards:  # the next one is for validation
        raise UserError(f"num-shards is at most {source.num_train_shards} for {source.name}")
    source.ensure_text()
    shards = list(range(options.num_shards)) or source.present_train()
    source.ensure(shards)
    return Choice(source.name, options, _shard_bytes(source, shards))


def train(
    source: Source, options: Options, directory: Path, *, num_threads: int | None = None
) -> RustBPETokenizer:
    """Train on `source` and write to `directory`; what can be checked is checked before the work.

    Raises UserError for missing shards, an unbuilt rustbpe, or a vocabulary that the text does not
    fill; nothing is left behind then. An interruption leaves the choice of shards.
    """
    tokenizer_module.load_rustbpe()  # raises where training is not possible
    _check_overwritable(directory)
    choice = choose(source, options, directory)
    print(f"reading shards {number_ranges(choice.shards)} of {source.name}")
    for shard in choice.shards:
        _check(source.shard_path(shard))
    directory.mkdir(parents=True, exist_ok=True)
    _write(choice, directory, {})
    paths = [source.shard_path(shard) for shard in choice.shards]
    batches = ([text for text in batch if text] for path in paths for batch in iter_texts(path))
    texts = cropped(batches, max_chars=options.max_chars, doc_cap=options.doc_cap)
    most = min(options.max_chars, sum(map(_text_bytes, paths)))
    with tqdm(total=most, unit="char", unit_scale=True, desc="reading") as bar:
        try:
            tokenizer = tokenizer_module.train_and_save(
                _counted(texts, bar), options.vocab_size, directory, num_threads=num_threads
            )
        except UserError:
            (directory / CHOICE_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.rmdir()  # if it was made for this training
            raise
        _write(choice, directory, {"chars": int(bar.n), "fingerprint": tokenizer.fingerprint()})
    return tokenizer


def _check_overwritable(directory: Path) -> None:
    """Raise UserError where another program's files would be overwritten."""
    entry = _choice_entry(directory)
    if entry is not None and not (isinstance(entry, dict) and "shard_bytes" in entry):
        raise UserError(
            f"{directory / CHOICE_FILE} was not made by this program: move it away, "
            "or name another directory with --tokenizer"
        )
    if entry and not (directory / TOKENIZER_FILE).exists():
        # ours: an older version of this program wrote the pickle first, and was interrupted
        (directory / PICKLE_FILE).unlink(missing_ok=True)
    tokenizer_module.check_overwritable(directory)


def _check(path: Path) -> None:
    try:
        check_shard(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def _counted(texts: Iterable[str], bar: tqdm) -> Iterator[str]:
    for text in texts:
        bar.update(len(text))
        yield text
    bar.total = bar.n  # it was an estimate
    bar.set_description("merging")
    bar.refresh()


def _unfinished(directory: Path) -> Choice | None:
    """The choice of a training that began in `directory` and did not finish."""
    entry = _choice_entry(directory)
    try:
        if entry is None or entry["result"]:
            return None
        return Choice(entry["source"], Options(**entry["options"]), entry["shard_bytes"])
    except (KeyError, TypeError, UserError):
        return None  # a damaged one: choose again


def _choice_entry(directory: Path) -> Any:
    """The content of `training.json`; None without one, or if it is no JSON (a damaged one)."""
    path = directory / CHOICE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable") from error


def _write(choice: Choice, directory: Path, result: dict[str, Any]) -> None:
    atomic_write_json(directory / CHOICE_FILE, asdict(choice) | {"result": result})


def _shard_bytes(source: Source, shards: list[int]) -> dict[str, int]:
    """Sizes in bytes; UserError for a shard whose name is there and whose file is not."""
    paths = {str(shard): source.shard_path(shard) for shard in shards}
    try:
        return {shard: path.stat().st_size for shard, path in paths.items()}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error


def _text_bytes(path: Path) -> int:
    """Upper estimate of the characters in a shard, from its footer."""
    footer = pq.read_metadata(path)
    column = footer.schema.names.index(TEXT_COLUMN)
    groups = (footer.row_group(group) for group in range(footer.num_row_groups))
    return sum(group.column(column).total_uncompressed_size for group in groups)


def main() -> None:
    parser = ArgumentParser(prog="python -m scripts.tok_train", description="Train the tokenizer.")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to read")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters kept per document")
    parser.add_argument(
        "--vocab-size", type=int, default=65_536, help="ids, the special tokens included"
    )
    parser.add_argument(
        "--num-shards", type=int, default=0, help="train on shards 0..n-1 (0: all that are here)"
    )
    parser.add_argument(
        "--source",
        default=DEFAULT_SOURCE,
        help=f"{', '.join(COLLECTIONS)}, hf:NAME, or a directory",
    )
    parser.add_argument(
        "--tokenizer",
        default=tokenizer_module.DEFAULT_DIRECTORY,
        help="where to: a name under the base directory, or a path",
    )
    parser.add_argument("--threads", type=int, default=0, help="threads (0: all cores)")
    args = parser.parse_args()

    options = Options(args.max_chars, args.doc_cap, args.vocab_size, args.num_shards)
    if not 0 <= args.threads <= MOST_THREADS:
        raise UserError(f"--threads must be from 0 (all cores) to {MOST_THREADS}")
    source = open_source(args.source)
    directory = tokenizer_dir(args.tokenizer)
    started = time.monotonic()
    tokenizer = train(source, options, directory, num_threads=args.threads or None)
    print(
        f"tokenizer of {tokenizer.get_vocab_size()} tokens in {tokenizer.directory} "
        f"after {time.monotonic() - started:.1f} s, fingerprint {tokenizer.fingerprint()}"
    )


if __name__ == "__main__":
    run_command_line(main)
