"""One training by one trainer in this process; `bpe.py` starts it. The last line on stdout is JSON.

python -m benchmarks.bpe_child TRAINER DOCUMENTS VOCAB THREADS TOKENS_OUT

DOCUMENTS holds 8 bytes of length and UTF-8 text for each document, so that nothing but the standard
library is in the process beside the trainer: what a parquet reader holds is not the trainer's.
"""

import importlib.metadata
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# GPT-4's with at most two digits a number token: `nanochat.tokenizer.SPLIT_PATTERN`.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
LENGTH_BYTES = 8
NUM_BYTES = 256


class Documents:
    """Yields the documents of a file, and notes when the last one was taken."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.ended = 0.0

    def __iter__(self) -> Iterator[str]:
        with open(self._path, "rb", buffering=1 << 20) as file:
            while length := file.read(LENGTH_BYTES):
                yield file.read(int.from_bytes(length, "little")).decode("utf-8")
        self.ended = time.monotonic()


def train_ours(documents: Documents, vocab: int, threads: int) -> tuple[float, Any]:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(documents, vocab, pattern=PATTERN, num_threads=threads)
    stats = tokenizer.training_stats
    return time.monotonic() - stats["merging_s"], tokenizer


def train_pypi(documents: Documents, vocab: int, threads: int) -> tuple[float, Any]:
    """The threads are those of $RAYON_NUM_THREADS; its log says when merging starts."""
    import rustbpe

    begun: list[float] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Starting BPE training"):
                begun.append(time.monotonic())

    logging.basicConfig(level=logging.INFO, handlers=[Note()])
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab, pattern=PATTERN)
    return (begun or [documents.ended])[0], tokenizer


def train_tokenizers(documents: Documents, vocab: int, threads: int) -> tuple[float, Any]:
    """The threads are those of $RAYON_NUM_THREADS; it merges once the iterator has ended."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(documents), trainer=trainer)
    return documents.ended, tokenizer


def new_tokens(tokenizer: Any) -> list[str]:
    """Hex of what each merge joined, in order."""
    if hasattr(tokenizer, "get_mergeable_ranks"):
        ranks = tokenizer.get_mergeable_ranks()
        return [bytes(token).hex() for token, rank in ranks if rank >= NUM_BYTES]
    byte_of = byte_level_bytes()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [bytes(byte_of[char] for char in "".join(pair)).hex() for pair in pairs]


def byte_level_bytes() -> dict[str, int]:
    """GPT-2's visible characters for bytes: printable Latin-1 for itself, U+0100 on for the rest."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(NUM_BYTES) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


def peak_rss_bytes() -> int:
    """Of this program alone: `ru_maxrss` would start at what the parent held when it forked."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


TRAINERS = {
    "ours": (train_ours, "rustbpe"),
    "rustbpe": (train_pypi, "rustbpe"),
    "tokenizers": (train_tokenizers, "tokenizers"),
}


def main() -> None:
    name, path, vocab, threads, tokens_out = sys.argv[1:]
    train, distribution = TRAINERS[name]
    documents = Documents(path)
    idle_rss_bytes = peak_rss_bytes()
    started, cpu_started = time.monotonic(), time.process_time()
    merging, tokenizer = train(documents, int(vocab), int(threads))
    ended = time.monotonic()
    result = {
        "version": importlib.metadata.version(distribution),
        "total_s": ended - started,
        "counting_s": merging - started,
        "merging_s": ended - merging,
        "cpu_s": time.process_time() - cpu_started,
        "peak_rss_bytes": peak_rss_bytes(),
        "idle_rss_bytes": idle_rss_bytes,
    }
    tokens = new_tokens(tokenizer)
    Path(tokens_out).write_text("\n".join(tokens))
    print(json.dumps(result | {"merges": len(tokens)}))


if __name__ == "__main__":
    main()
