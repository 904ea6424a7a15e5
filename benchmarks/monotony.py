"""Seconds for text that repeats one thing, and for twice as much of it: nothing may take the square.

python -m benchmarks.monotony
python -m benchmarks.monotony --bytes 300000 --repeat 5 --kinds spaces,letters

Real corpora hold documents of one kind of character: tables drawn with spaces, logs of one byte, dumps of
digits. Each `kind` goes through all that a document meets, in --bytes bytes and in twice as many:
`guard` (cutting long runs of white space), `tiktoken` and `rustbpe` (ids, for chat and for packing), `train`
(a vocabulary on this text alone), `merges` (the export of one trained on an eighth of it, whose longest token
grows with it), `pack` (ids to rows, both packings) and `decode` (ids to text, as chat prints it).

Lines are JSON, one per kind: CPU seconds (of all threads: others on the machine count less) for the shorter
text and ratios of the longer one to it, the least of --repeat rounds each. About 2 is linear, 4 is the
square; of a work that takes less than a millisecond the ratio says nothing and is null. The last line has
the slowest work and the highest ratio.
"""

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from nanochat.common import ArgumentParser, run_command_line
from nanochat.engine import stream_text
from nanochat.errors import UserError
from nanochat.rows.encoder import BatchEncoder
from nanochat.rows.packing import PACKINGS, make_packer, row_dtype
from nanochat.text import space_pieces
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer, load_rustbpe
from nanochat.tokenizer_export import merges

KINDS = {  # what is repeated
    "spaces": " ",
    "newlines": "\n",
    "letters": "a",
    "digits": "1",
    "punctuation": "!",
    "apostrophes": "'",
    "contractions": "'s",
    "mixed runs": " " * 60 + "\n" + "\t " * 20 + "-" * 50 + "a" * 70 + "12" * 30,
    "mixed white space": " \n\t\u00a0",
    "runs below the limit": " " * 60_000 + "|\n",  # of what tiktoken's engine takes at once
    "CJK": "\u6f22",
    "combining marks": "e\u0301\u0302",
    "marks alone": "\u0301",
    "emoji": "\U0001f600",
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
}
SEQUENCE_LEN = 512
MERGES = 24  # of a vocabulary on one kind: enough for a token as long as the text
LEAST_S = 1e-3

# (what makes the input of a text, what is measured on that input)
Work = tuple[Callable[[str], Any], Callable[[Any], Any]]


def text_of(kind: str, num_bytes: int) -> str:
    """`num_bytes` bytes of a kind, or a character less."""
    unit = KINDS[kind].encode()
    return (unit * (num_bytes // len(unit) + 1))[:num_bytes].decode(errors="ignore")


def tokenizer_of_all() -> RustBPETokenizer:
    """A small vocabulary that knows all kinds."""
    return RustBPETokenizer.train_from_iterator(
        [text_of(kind, 4000) for kind in KINDS] + ["the quick brown fox jumps over it " * 20], 400
    )


def ranks_of(text: str) -> dict[bytes, int]:
    """The vocabulary of a training on `text` alone."""
    trainer = load_rustbpe().Tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the text fills fewer tokens
        trainer.train_from_iterator([text], 256 + MERGES, pattern=SPLIT_PATTERN, num_threads=1)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def works(tokenizer: RustBPETokenizer) -> dict[str, Work]:
    """All that a document meets, by name."""
    encoder = BatchEncoder(tokenizer, dtype=row_dtype(tokenizer.get_vocab_size()))

    def itself(text: str) -> str:
        return text

    return {
        "guard": (itself, lambda text: list(space_pieces(text))),
        "tiktoken": (itself, tokenizer.encode),
        "rustbpe": (itself, lambda text: encoder.encode([text])),
        "train": (itself, ranks_of),
        "merges": (lambda text: ranks_of(text[: len(text) // 8]), merges),
        "pack": (lambda text: encoder.encode([text])[0], lambda ids: packed(tokenizer, ids)),
        "decode": (tokenizer.encode, lambda ids: "".join(stream_text(tokenizer, ids))),
    }


def packed(tokenizer: RustBPETokenizer, ids: np.ndarray) -> int:
    """Rows of the document in both packings, in numbers."""
    rows = 0
    for packing in PACKINGS:
        packer = make_packer(
            packing,
            sequence_len=SEQUENCE_LEN,
            bos=tokenizer.get_bos_token_id(),
            dtype=row_dtype(tokenizer.get_vocab_size()),
        )
        rows += sum(1 for _ in packer.rows([(0, ids)]))
    return rows


def seconds(work: Work, text: str, repeat: int) -> float:
    make, measured = work
    material, best = make(text), float("inf")
    for _ in range(repeat):
        began = time.process_time()
        measured(material)
        best = min(best, time.process_time() - began)
    return best


def measure(kind: str, all_works: dict[str, Work], size: int, repeat: int) -> Any:
    """Seconds and ratios of every work on one kind."""
    row: dict[str, Any] = {"kind": kind, "bytes": size, "seconds": {}, "ratio": {}}
    for name, work in all_works.items():
        short, long = (seconds(work, text_of(kind, n), repeat) for n in (size, 2 * size))
        row["seconds"][name] = round(short, 5)
        row["ratio"][name] = round(long / short, 2) if short >= LEAST_S else None
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest work and the highest ratio, with their kinds."""
    slowest = max((s, name, row["kind"]) for row in rows for name, s in row["seconds"].items())
    ratios = [(r, name, row["kind"]) for row in rows for name, r in row["ratio"].items() if r]
    return {
        "bytes": rows[0]["bytes"],
        "slowest": slowest,
        "highest_ratio": max(ratios, default=None),
    }


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.monotony", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=300_000, help="of the shorter text")
    parser.add_argument("--repeat", type=int, default=2, help="rounds, of which the least is taken")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"unknown kind {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if args.bytes < 1 or args.repeat < 1:
        raise UserError("--bytes and --repeat must be at least 1")
    all_works, rows = works(tokenizer_of_all()), []
    for kind in kinds:
        rows.append(measure(kind, all_works, args.bytes, args.repeat))
        print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    run_command_line(main)
