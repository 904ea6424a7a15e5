"""Byte-pair tokenizer: trained by rustbpe, applied by tiktoken, saved as JSON.

Three files make a tokenizer directory. `tokenizer.json` is the one that we read; its SHA-256 is the
tokenizer's fingerprint, which sites compare. `tokenizer.pkl` (a pickled `tiktoken.Encoding`) is
written for upstream only: unpickling runs code, so we never read it. `token_bytes.pt` holds the
byte length of each token, for bits per byte.
"""

import base64
import hashlib
import importlib
import json
import pickle
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

from nanochat.common import get_base_dir, user_path
from nanochat.errors import UserError
from nanochat.files import atomic_file, atomic_write_bytes
from nanochat.text import LONGEST_SPACE, space_pieces, valid_text

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = [  # after the mergeable ranks, in this order
    "<|bos|>",  # in front of every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a call of the Python tool …
    "<|python_end|>",
    "<|output_start|>",  # … and what it gave back
    "<|output_end|>",
]
# GPT-4's, with at most two digits a number token (it has three): small vocabularies have no room.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEFAULT_DIRECTORY = "tokenizer"
TOKENIZER_FILE, PICKLE_FILE, _TOKEN_BYTES = "tokenizer.json", "tokenizer.pkl", "token_bytes.pt"
_FORMAT_NAME = "nanochat-bpe-"
_FORMAT = f"{_FORMAT_NAME}1"
_NUM_BYTES = 256
MIN_VOCAB_SIZE = _NUM_BYTES + len(SPECIAL_TOKENS)
_MAX_VOCAB_SIZE = 2**31 - 1  # rustbpe's limit
_MAX_SPECIAL = 1000  # tiktoken makes one regular expression of them
_PROBE = "".join(map(chr, range(256))) + " Two words,\n\n 12345   é 漢字 🙂\t"


class RustBPETokenizer:
    """A tokenizer in memory. `encode` gives lists of ids; ids of text never include special tokens.

    `directory` is where it was loaded from or last saved to, None while it is in memory only.
    """

    def __init__(self, encoding: tiktoken.Encoding, *, directory: Path | None = None) -> None:
        self.enc = encoding
        self.directory = directory
        self.bos_token_id = self.encode_special("<|bos|>")
        self._fingerprint: str | None = None  # some 30 ms, and asked for often

    @classmethod
    def train_from_iterator(
        cls, text_iterator: Iterable[str], vocab_size: int, *, num_threads: int | None = None
    ) -> "RustBPETokenizer":
        """Train on documents; `vocab_size` counts the special tokens.

        The same for the same texts on any number of threads (default: all cores). Raises UserError
        if `vocab_size` is out of range, or larger than the text can fill, and TypeError for one str.
        """
        check_vocab_size(vocab_size)
        if isinstance(text_iterator, str):
            raise TypeError("training takes documents, not one str: put it in a list")
        trainer = load_rustbpe().Tokenizer()
        num_mergeable = vocab_size - len(SPECIAL_TOKENS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of too little text: an error below
            trainer.train_from_iterator(
                map(valid_text, text_iterator),
                num_mergeable,
                pattern=SPLIT_PATTERN,
                num_threads=num_threads,
            )
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) < num_mergeable:
            most = len(ranks) + len(SPECIAL_TOKENS)
            raise UserError(
                f"the text fills a vocabulary of {most} only: "
                f"train on more text, or set vocab_size to at most {most}"
            )
        return cls(_encoding(SPLIT_PATTERN, ranks, SPECIAL_TOKENS))

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path) -> "RustBPETokenizer":
        """Load `tokenizer.json`; raises UserError when it is missing or damaged."""
        directory = Path(tokenizer_dir).absolute()
        path = directory / TOKENIZER_FILE
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["format"] != _FORMAT:
                raise ValueError(f"its format is {entry['format']!r}, not {_FORMAT!r}")
            tokens = [base64.b64decode(token, validate=True) for token in entry["mergeable"]]
            ranks = {token: rank for rank, token in enumerate(tokens)}
            if len(ranks) != len(tokens):
                raise ValueError("it names a token twice")
            encoding = _encoding(entry["pattern"], ranks, entry["special"])
            _check_whole(encoding)
            return cls(encoding, directory=directory)
        except FileNotFoundError as error:
            raise UserError(_missing(directory)) from error
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}): make it readable") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({error}): delete {directory} and train the tokenizer again"
            ) from error

    def save(self, tokenizer_dir: str | Path) -> None:
        """Write the three files. A crash leaves no half tokenizer, and no pickle without ours.

        Raises UserError where another program's tokenizer would be overwritten (`check_overwritable`).
        """
        import torch

        directory = Path(tokenizer_dir).absolute()
        check_overwritable(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for old in (PICKLE_FILE, TOKENIZER_FILE):
            (directory / old).unlink(missing_ok=True)
        with atomic_file(directory / _TOKEN_BYTES) as file:
            torch.save(torch.tensor(self.token_bytes(), dtype=torch.int32), file)
        atomic_write_bytes(directory / TOKENIZER_FILE, self._to_json())
        atomic_write_bytes(directory / PICKLE_FILE, pickle.dumps(self.enc))
        self.directory = directory

    def fingerprint(self) -> str:
        """Hex SHA-256 of `tokenizer.json`; equal tokenizers have equal ones."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self._to_json()).hexdigest()
        return self._fingerprint

    def get_vocab_size(self) -> int:
        """Number of ids, the special tokens included."""
        return self.enc.n_vocab

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    def get_special_tokens(self) -> set[str]:
        return self.enc.special_tokens_set

    def id_to_token(self, id: int) -> str:
        return self.enc.decode([id])

    def encode_special(self, text: str) -> int:
        """The id of a special token; KeyError for any other text."""
        return self.enc.encode_single_token(text)

    def encode(
        self,
        text: str | Sequence[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> Any:
        """Ids of a text, or a list of ids for each of several; special tokens in texts are text.

        `prepend` and `append` are ids or names of special tokens to put around each text.
        """
        head = [] if prepend is None else [self._special_id(prepend)]
        tail = [] if append is None else [self._special_id(append)]
        if isinstance(text, str):
            return head + self._encode_text(text) + tail
        if num_threads == 1:  # spares the threads' overhead
            rows = [self._encode_text(one) for one in text]
        else:
            with ThreadPoolExecutor(num_threads) as pool:  # tiktoken encodes without the GIL
                rows = list(pool.map(self._encode_text, text))
        return [head + row + tail for row in rows] if head or tail else rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.encode(*args, **kwargs)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.enc.decode(list(ids))

    def token_bytes(self) -> list[int]:
        """Bytes that each id stands for; 0 for special tokens, which stand for no text.

        Raw bytes: upstream measures the decoded string instead, where a token that is not UTF-8 by
        itself counts three bytes for each U+FFFD.
        """
        special = self.enc._special_tokens.values()
        return [
            0 if id in special else len(self.enc.decode_single_token_bytes(id))
            for id in range(self.get_vocab_size())
        ]

    def _encode_text(self, text: str) -> list[int]:
        if len(text) <= LONGEST_SPACE:
            return self.enc.encode_ordinary(text)
        return [id for piece in space_pieces(text) for id in self.enc.encode_ordinary(piece)]

    @property
    def split_pattern(self) -> str:
        """Of the pieces that no merge crosses."""
        return self.enc._pat_str

    def mergeable_tokens(self) -> list[bytes]:
        """The bytes of every token but the special ones, in the order of their ids."""
        ranks = self.enc._mergeable_ranks
        return sorted(ranks, key=ranks.__getitem__)

    def _special_id(self, token: int | str) -> int:
        return token if isinstance(token, int) else self.encode_special(token)

    def _to_json(self) -> bytes:
        special = sorted(self.enc._special_tokens.items(), key=lambda item: item[1])
        entry = {
            "format": _FORMAT,
            "pattern": self.split_pattern,
            "special": [name for name, _ in special],
            "mergeable": [
                base64.b64encode(token).decode("ascii") for token in self.mergeable_tokens()
            ],
        }
        return (json.dumps(entry, indent=0, ensure_ascii=False) + "\n").encode("utf-8")


def tokenizer_dir(name_or_path: str | Path = DEFAULT_DIRECTORY) -> Path:
    """The absolute path of a tokenizer's directory; that of the result is the result.

    A bare name is a directory under the base directory. Anything with a slash, `.`, `..` and a
    `Path` is a path, seen from the working directory.
    """
    return get_base_dir() / tokenizer_name(name_or_path)  # an absolute path stays itself


def tokenizer_name(name_or_path: str | Path) -> str:
    """What to write down for a tokenizer: a bare name as it is, a path as an absolute one."""
    text = str(name_or_path)
    if not text:
        raise UserError("the tokenizer's name is empty: give a name or a path")
    if isinstance(name_or_path, Path) or "/" in text or text in (".", "..") or text[0] == "~":
        return str(user_path(name_or_path))
    return text


def get_tokenizer(directory: str | Path | None = None) -> RustBPETokenizer:
    """The tokenizer in `directory` (default: `tokenizer/` of the base directory)."""
    return RustBPETokenizer.from_directory(tokenizer_dir(directory or DEFAULT_DIRECTORY))


def get_token_bytes(
    directory: str | Path | None = None, device: "str | torch.device" = "cpu"
) -> "torch.Tensor":
    """Bytes of each token, (vocab_size,) int32, 0 for special tokens."""
    import torch

    path = tokenizer_dir(directory or DEFAULT_DIRECTORY) / _TOKEN_BYTES
    try:
        token_bytes: torch.Tensor = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(_missing(path.parent)) from error
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file torch's reader raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}): delete {path.parent} and train the tokenizer again"
        ) from error
    return token_bytes


def train_and_save(
    text_iterator: Iterable[str],
    vocab_size: int,
    directory: str | Path,
    *,
    num_threads: int | None = None,
) -> RustBPETokenizer:
    """Train a tokenizer and write it to `directory` (a name or a path).

    Raises UserError, before the training, where another program's tokenizer is.
    """
    path = tokenizer_dir(directory)
    check_overwritable(path)
    tokenizer = RustBPETokenizer.train_from_iterator(
        text_iterator, vocab_size, num_threads=num_threads
    )
    tokenizer.save(path)
    return tokenizer


def check_overwritable(directory: Path) -> None:
    """Raise UserError if `directory` holds a tokenizer that another program, such as upstream, made.

    That is a pickle without our `tokenizer.json`, or a `tokenizer.json` in another format.
    """
    theirs = directory / TOKENIZER_FILE
    try:
        entry = json.loads(theirs.read_text(encoding="utf-8"))
        if isinstance(entry, dict) and str(entry.get("format", "")).startswith(_FORMAT_NAME):
            return
    except (FileNotFoundError, NotADirectoryError):
        theirs = directory / PICKLE_FILE
        if not theirs.exists():
            return
    except OSError as error:
        raise UserError(f"cannot read {theirs} ({error.strerror}): make it readable") from error
    except ValueError:
        pass
    raise UserError(
        f"{theirs} was not made by this program, and others may need it: move it away, "
        "or name another directory with --tokenizer"
    )


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless `vocab_size` holds all bytes and special tokens, and 31 bits hold it."""
    if vocab_size > _MAX_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size:,} is too large: at most {_MAX_VOCAB_SIZE:,}")
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: it needs at least {MIN_VOCAB_SIZE} "
            f"({_NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )


def _encoding(pattern: str, ranks: dict[bytes, int], special: Sequence[str]) -> tiktoken.Encoding:
    ids = {name: len(ranks) + offset for offset, name in enumerate(special)}
    if len(ids) != len(special) or len(ids) > _MAX_SPECIAL:
        raise ValueError(f"its special tokens are not different ones, at most {_MAX_SPECIAL}")
    missing = [token for token in SPECIAL_TOKENS if token not in ids]
    if missing:
        raise ValueError(f"it has no special token {missing[0]}")
    return tiktoken.Encoding(
        name="rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ids
    )


def _check_whole(encoding: tiktoken.Encoding) -> None:
    """Raise ValueError if a text does not come back: the pattern or the tokens of a file say how it is cut."""
    try:
        whole = encoding.decode(encoding.encode_ordinary(_PROBE)) == _PROBE
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of tiktoken in Rust is no Exception
        raise ValueError(f"text cannot be encoded by it: {error}") from None
    if not whole:
        raise ValueError("a text that it encodes does not come back")


def _missing(directory: Path) -> str:
    train = "python -m scripts.tok_train --max-chars=4000000000 --vocab-size=65536"
    if directory.name != DEFAULT_DIRECTORY:
        train += f" --tokenizer={directory}"
    if (directory / PICKLE_FILE).exists():
        return (
            f"{directory} has a {PICKLE_FILE} only, which is never loaded (unpickling runs code): "
            f"if another program needs it, move it away; then train one with `{train}`"
        )
    return f"there is no tokenizer in {directory}: make one with `{train}`"


def load_rustbpe() -> Any:
    """The extension module; UserError without it.

    Unbuilt, `rustbpe/` of the repository imports as an empty namespace.
    """
    try:
        module: Any = importlib.import_module("rustbpe")
    except ImportError:
        module = None
    if not hasattr(module, "Tokenizer") or not hasattr(module.Tokenizer, "from_ranks"):
        raise UserError(
            "rustbpe is not built, or older than this program: run `uv sync`, "
            "or `maturin develop --release --manifest-path rustbpe/Cargo.toml`"
        )
    return module
