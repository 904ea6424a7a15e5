"""Bytes per token on held-out text, beside GPT-2's and GPT-4's tokenizers.

python -m scripts.tok_eval
python -m scripts.tok_eval --source builtin --tokenizer tokenizer_tiny

The text is the validation shard, which no tokenizer of ours is trained on. More bytes per token are
fewer steps of the model for the same text. The public tokenizers are those that tiktoken can load,
from its cache or the network: one that it can't load has a line that says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import requests
import tiktoken

from nanochat.builtin import open_source
from nanochat.common import ArgumentParser, run_command_line
from nanochat.errors import UserError
from nanochat.source import COLLECTIONS, DEFAULT_SOURCE, cropped, parquets_iter_batched
from nanochat.tokenizer import DEFAULT_DIRECTORY, get_tokenizer

PUBLIC = {"gpt2": "GPT-2", "cl100k_base": "GPT-4"}  # tiktoken's name, and whose it is
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Score:
    name: str
    vocab_size: int
    num_tokens: int
    num_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens


def score(
    name: str, vocab_size: int, encode: Callable[[list[str]], list[list[int]]], texts: list[str]
) -> Score:
    num_tokens = sum(
        len(ids)
        for first in range(0, len(texts), _BATCH_DOCUMENTS)
        for ids in encode(texts[first : first + _BATCH_DOCUMENTS])
    )
    return Score(name, vocab_size, num_tokens, sum(len(text.encode()) for text in texts))


def public_encoding(name: str) -> tiktoken.Encoding | str:
    """tiktoken's encoding, or the reason why it is unavailable."""
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        return f"not in tiktoken's cache and not to be downloaded ({type(error).__name__})"
    except (OSError, ValueError) as error:  # a broken cache file, or an unknown name
        return str(error).splitlines()[0]


def table(scores: list[Score]) -> list[str]:
    """Lines; the last column says how many more tokens than the first tokenizer one needs."""
    head = f"{'tokenizer':<28}{'vocabulary':>11}{'tokens':>13}{'bytes/token':>13}{'tokens':>9}"
    lines = [head, "-" * len(head)]
    for entry in scores:
        more = 100 * (entry.num_tokens / scores[0].num_tokens - 1)
        lines.append(
            f"{entry.name:<28}{entry.vocab_size:>11,}{entry.num_tokens:>13,}"
            f"{entry.bytes_per_token:>13.3f}{more:>+8.1f}%"
        )
    return lines


def main() -> None:
    parser = ArgumentParser(
        prog="python -m scripts.tok_eval", description="Bytes per token on held-out text."
    )
    parser.add_argument(
        "--tokenizer", default=DEFAULT_DIRECTORY, help="a name under the base directory, or a path"
    )
    parser.add_argument(
        "--source",
        default=DEFAULT_SOURCE,
        help=f"{', '.join(COLLECTIONS)}, hf:NAME, or a directory",
    )
    parser.add_argument("--max-chars", type=int, default=20_000_000, help="characters to read")
    args = parser.parse_args()

    if args.max_chars < 1:
        raise UserError(f"--max-chars is {args.max_chars}: it must be at least 1")
    tokenizer = get_tokenizer(args.tokenizer)
    source = open_source(args.source)
    batches = parquets_iter_batched("val", source=source)
    texts = list(cropped(batches, max_chars=args.max_chars, doc_cap=0))
    if not any(texts):
        raise UserError(f"the validation shard of {source.name} has no text: get it again")
    name = tokenizer.directory.name if tokenizer.directory else "ours"
    scores = [score(name, tokenizer.get_vocab_size(), tokenizer.encode, texts)]
    missing = []
    for encoding_name, owner in PUBLIC.items():
        encoding = public_encoding(encoding_name)
        label = f"{owner} ({encoding_name})"
        if isinstance(encoding, str):
            missing.append(f"{label}: {encoding}")
            continue
        scores.append(score(label, encoding.n_vocab, encoding.encode_ordinary_batch, texts))
    print(
        f"shard {source.val_shard} of {source.name}: {len(texts):,} documents, "
        f"{scores[0].num_bytes:,} bytes"
    )
    print("\n".join(table(scores) + missing))


if __name__ == "__main__":
    run_command_line(main)
