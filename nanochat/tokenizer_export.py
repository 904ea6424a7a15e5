"""Write a tokenizer in the format of HF tokenizers, for transformers and all that reads it.

    python -m nanochat.tokenizer_export --tokenizer tokenizer --out DIRECTORY

The ids are the same: merges are applied in the order in which they were found, and a piece that one
token covers becomes that token, as with tiktoken. Two things are the library's own habits: names of
special tokens in a text become those tokens (`split_special_tokens=True` turns that off), and
`<|bos|>` is put in front unless `add_special_tokens=False` is said.

Our own `tokenizer.json` has another format, so the two never share a directory.
"""

import heapq
import json
from pathlib import Path
from typing import Any

from nanochat.common import ArgumentParser, run_command_line, user_path
from nanochat.errors import UserError
from nanochat.files import atomic_write_json
from nanochat.tokenizer import DEFAULT_DIRECTORY, RustBPETokenizer, get_tokenizer

BOS = "<|bos|>"
_NUM_BYTES = 256


def export_hf(
    tokenizer: RustBPETokenizer, directory: str | Path, *, sequence_len: int | None = None
) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads.

    `sequence_len` is the model's, in tokens; the library warns of longer texts. Raises UserError
    when `directory` holds another tokenizer, of ours or of another program.
    """
    if sequence_len is not None and sequence_len < 1:
        raise UserError(f"a sequence length of {sequence_len} is too short: choose at least 1")
    directory = user_path(directory)
    files = {
        directory / "tokenizer_config.json": _config(tokenizer, sequence_len),
        directory / "tokenizer.json": hf_json(tokenizer),
    }
    for path in (directory / "tokenizer.pkl", *files):
        if path.exists() and not (path in files and _holds(path, files[path])):
            raise UserError(f"{path} is of another tokenizer: name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        atomic_write_json(path, content)
    return directory


def _holds(path: Path, content: dict[str, Any]) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return bool(found == content)


def hf_json(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """The content of HF's `tokenizer.json`."""
    encoding = tokenizer.enc
    ranks = encoding._mergeable_ranks
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    split = {
        "type": "Split",
        "pattern": {"Regex": encoding._pat_str},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, "special": True} | flags for name, id in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _bos_first(encoding.encode_single_token(BOS)),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {_visible(token): rank for token, rank in ranks.items()},
            "merges": [[_visible(left), _visible(right)] for left, right in merges(ranks)],
        },
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two tokens that each merge joined, in order.

    A token's parts are what the merges before its own make of its bytes: two tokens always, since
    all of its bytes were once these two. Raises ValueError for ranks that no training gives.
    """
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return [_two_parts(token, rank, ranks) for token, rank in by_rank if rank >= _NUM_BYTES]


def _two_parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """What the merges below `rank` make of `token`. A heap: a token of one letter may have 10,000 bytes."""
    length = len(token)
    ends = list(range(1, length + 1))  # of the part that begins there; 0 if none does
    before = list(range(-1, length))  # where the part in front of it begins
    heap: list[tuple[int, int, int, int]] = []  # (rank, begin, middle, end) of two neighbours

    def consider(begin: int, middle: int, end: int) -> None:
        joined = ranks.get(token[begin:end], rank)
        if joined < rank:
            heapq.heappush(heap, (joined, begin, middle, end))

    for begin in range(length - 1):
        consider(begin, begin + 1, begin + 2)
    parts = length
    while parts > 2 and heap:
        _, begin, middle, end = heapq.heappop(heap)
        if ends[begin] != middle or ends[middle] != end:
            continue  # one of them has grown since
        ends[begin], ends[middle], before[end] = end, 0, begin
        parts -= 1
        if begin > 0:
            consider(before[begin], begin, end)
        if end < length:
            consider(begin, end, ends[end])
    if parts != 2:
        raise ValueError(f"token {rank} is not made of two earlier ones")
    return token[: ends[0]], token[ends[0] :]


def _visible(token: bytes) -> str:
    return token.decode("latin-1").translate(_VISIBLE)


def _byte_level_table() -> dict[int, str]:
    """GPT-2's characters for bytes: printable Latin-1 is itself, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    return {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_VISIBLE = _byte_level_table()


def _bos_first(bos_id: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
    }


def _config(tokenizer: RustBPETokenizer, sequence_len: int | None) -> dict[str, Any]:
    others = sorted(tokenizer.get_special_tokens() - {BOS})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,  # separates documents: where the next one begins, this one ends
        "pad_token": BOS,  # hidden by the attention mask; without one, no batch of unequal texts
        "padding_side": "left",  # generation continues at the right
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
    }
    return config if sequence_len is None else config | {"model_max_length": sequence_len}


def main() -> None:
    parser = ArgumentParser(
        prog="python -m nanochat.tokenizer_export",
        description="Write a tokenizer in the format of HF tokenizers and transformers.",
    )
    parser.add_argument(
        "--tokenizer", default=DEFAULT_DIRECTORY, help="a name under the base directory, or a path"
    )
    parser.add_argument("--out", required=True, help="the directory to write to")
    parser.add_argument("--sequence-len", type=int, help="the model's, in tokens")
    args = parser.parse_args()
    directory = export_hf(get_tokenizer(args.tokenizer), args.out, sequence_len=args.sequence_len)
    print(f"tokenizer.json and tokenizer_config.json for transformers in {directory}")


if __name__ == "__main__":
    run_command_line(main)
