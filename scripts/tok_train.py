"""Train the tokenizer on the training shards that are on this disk.

python -m scripts.tok_train --max-chars=4000000000 --vocab-size=65536
python -m scripts.tok_train --source builtin --vocab-size 4096 --tokenizer tokenizer_tiny
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from nanochat import tokenizer as tokenizer_module
from nanochat.common import ArgumentParser, UserError, run_command_line
from nanochat.dataset import (
    COLLECTIONS,
    DEFAULT_SOURCE,
    TEXT_COLUMN,
    Source,
    get_source,
    parquets_iter_batched,
    prepare_builtin,
)
from nanochat.tokenizer import RustBPETokenizer, cropped, tokenizer_dir


def train(
    source: Source, *, max_chars: int, doc_cap: int, vocab_size: int, directory: Path
) -> RustBPETokenizer:
    """Train on `source` and write to `directory`; what can be checked is checked before the work.

    Raises UserError for a vocabulary that is too small, missing shards, or an unbuilt rustbpe.
    """
    tokenizer_module.check_vocab_size(vocab_size)
    tokenizer_module.check_trainable()
    if max_chars < 1 or doc_cap < 0:
        raise UserError("max-chars must be at least 1 and doc-cap at least 0 (0 crops nothing)")
    source.ensure_text()
    batches = parquets_iter_batched("train", source=source)
    texts = cropped(batches, max_chars=max_chars, doc_cap=doc_cap)
    total = min(max_chars, _text_bytes(source))
    with tqdm(total=total, unit="char", unit_scale=True, desc="reading") as bar:
        return tokenizer_module.train_and_save(_counted(texts, bar), vocab_size, directory)


def _counted(texts: Iterable[str], bar: tqdm) -> Iterator[str]:
    for text in texts:
        bar.update(len(text))
        yield text
    bar.set_description("merging")
    bar.refresh()


def _text_bytes(source: Source) -> int:
    """Upper estimate of the characters there, from the shards' footers."""
    total = 0
    for shard in source.present_train():
        footer = pq.read_metadata(source.shard_path(shard))
        column = footer.schema.names.index(TEXT_COLUMN)
        for group in range(footer.num_row_groups):
            total += footer.row_group(group).column(column).total_uncompressed_size
    return total


def main() -> None:
    parser = ArgumentParser(prog="python -m scripts.tok_train", description="Train the tokenizer.")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to read")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters kept a document")
    parser.add_argument(
        "--vocab-size", type=int, default=65_536, help="ids, the special tokens included"
    )
    parser.add_argument(
        "--source", default=DEFAULT_SOURCE, help=f"{', '.join(COLLECTIONS)}, or a directory"
    )
    parser.add_argument(
        "--tokenizer",
        default=tokenizer_module.DEFAULT_DIRECTORY,
        help="where to: a name under the base directory, or a path",
    )
    args = parser.parse_args()

    tokenizer_module.check_vocab_size(args.vocab_size)
    source = prepare_builtin() if args.source == "builtin" else get_source(args.source)
    started = time.monotonic()
    tokenizer = train(
        source,
        max_chars=args.max_chars,
        doc_cap=args.doc_cap,
        vocab_size=args.vocab_size,
        directory=tokenizer_dir(args.tokenizer),
    )
    print(
        f"tokenizer of {tokenizer.get_vocab_size()} tokens in {tokenizer.directory} "
        f"after {time.monotonic() - started:.1f} s, fingerprint {tokenizer.fingerprint()}"
    )


if __name__ == "__main__":
    run_command_line(main)
