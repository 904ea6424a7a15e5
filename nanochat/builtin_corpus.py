"""A few megabytes of English that every installation has, so that a first run needs no network.

The texts are the language reference in `pydoc_data` and the docstrings of the standard library,
numpy and torch. Source files are parsed, never imported: nothing runs, nothing depends on devices
or on the order of imports, and the same installed versions give the same bytes on every machine.
Sites compare `manifest_sha256`; sites with other versions have other texts and are refused.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.errors import UserError
from nanochat.files import atomic_file, atomic_write_json, file_lock, sha256_file

NUM_TRAIN_SHARDS = 8
VAL_SHARD = NUM_TRAIN_SHARDS  # the last of the collection, as everywhere
MANIFEST = "manifest.json"
_FORMAT = 1
_SHUFFLE_SEED = 20260701
_MIN_CHARS = 200  # below, a docstring is a phrase ("Return the name.") more than a text
_MAX_CHARS = 50_000  # above, it is a table
_MIN_PROSE_SHARE = 0.7  # letters and spaces among all characters; drops tables and number listings
# Parsing is the cost: files with less text than this take 60 % of the time for 25 % of the text.
_MIN_QUOTED_SHARE = 0.25
_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)
_ROWS_PER_GROUP = 256

# Tests hold no prose, and the large private packages of torch are seconds of parsing for few texts.
_SKIPPED_DIRS = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "_vendor"),
    *("idlelib", "lib2to3", "onnx", "_inductor", "_dynamo", "_functorch", "_export"),
    "_higher_order_ops",
}


def prepare(directory: Path) -> Path:
    """Make the corpus in `directory`, once; a later call only verifies it against its manifest.

    Two processes at once: one makes it, the other waits. A corpus that does not match its manifest
    (a crash, a bad disk) is made again. An intact one is kept even when newer versions are installed
    by now: the books of a run are about its rows. Returns `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with file_lock(directory / ".lock"):
        if not is_intact(directory):
            _write(directory, _texts_by_shard())
    return directory


def is_intact(directory: Path) -> bool:
    """Whether every shard is there with the hash that the manifest names (milliseconds)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        shards = manifest["shards"]
        return bool(shards) and all(
            sha256_file(directory / name) == entry["sha256"] for name, entry in shards.items()
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def manifest_sha256(directory: Path) -> str:
    """Hash over all shards' hashes; equal on sites that hold the same texts."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        hashes = {name: entry["sha256"] for name, entry in manifest["shards"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the built-in corpus in {directory} is missing or damaged: "
            "run `python -m nanochat.dataset --source builtin`"
        ) from error
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def texts() -> list[str]:
    """All documents, each once, shuffled by a fixed seed."""
    seen: set[str] = set()
    documents = []
    for raw in _all_texts():
        text = raw.encode("utf-8", "ignore").decode("utf-8")  # a literal may hold a lone surrogate
        normal = " ".join(text.lower().split())
        if _is_prose(text) and normal not in seen:
            seen.add(normal)
            documents.append(text)
    random.Random(_SHUFFLE_SEED).shuffle(documents)
    return documents


def _texts_by_shard() -> list[list[str]]:
    """The documents of each shard; each is in one only, so none of validation's is trained on."""
    documents = texts()
    shards = NUM_TRAIN_SHARDS + 1
    return [documents[shard::shards] for shard in range(shards)]


def _write(directory: Path, shards: list[list[str]]) -> None:
    (directory / MANIFEST).unlink(missing_ok=True)
    entries: dict[str, Any] = {}
    for number, documents in enumerate(shards):
        path = directory / f"shard_{number:05d}.parquet"
        table = pa.table({"text": pa.array(documents, type=pa.string())})
        with atomic_file(path) as file:
            pq.write_table(
                table,
                file,
                compression="zstd",
                row_group_size=_ROWS_PER_GROUP,
                write_page_checksum=True,
            )
        entries[path.name] = {
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "documents": len(documents),
            "characters": sum(map(len, documents)),
        }
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch", "pyarrow")}
    versions["python"] = platform.python_version()
    manifest = {"format": _FORMAT, "shards": entries, "val_shard": VAL_SHARD, "versions": versions}
    atomic_write_json(directory / MANIFEST, manifest)


def _all_texts() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    yield from _topics(stdlib / "pydoc_data" / "topics.py")
    for root in (stdlib, _package_dir("numpy"), _package_dir("torch")):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
            if not _SKIPPED_DIRS.intersection(path.relative_to(root).parts):
                yield from _docstrings(path)


def _package_dir(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {name} is not installed: run `uv sync`")
    return Path(spec.submodule_search_locations[0])


def _topics(path: Path) -> Iterator[str]:
    """The language reference: one dictionary literal of topic -> text."""
    if not path.exists():  # some distributions split it off
        return
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for value in statement.value.values:
                text = ast.literal_eval(value)
                if isinstance(text, str):
                    yield text.strip()


def _docstrings(path: Path) -> Iterator[str]:
    source = path.read_bytes()
    in_quotes = sum(len(text) for text in _QUOTED.findall(source) if len(text) >= _MIN_CHARS)
    if in_quotes < _MIN_QUOTED_SHARE * len(source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and files for other versions
        return
    yield from filter(None, [ast.get_docstring(tree)])
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from filter(None, [ast.get_docstring(statement)])
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            # `add_docstr(function, r'''…''')`: how torch and numpy document what is written in C
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value.strip()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, its classes and branches; not of functions."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.ClassDef | ast.If | ast.Try):
            yield from _statements(statement.body)
            yield from _statements(getattr(statement, "orelse", []))


def _is_prose(text: str) -> bool:
    if not _MIN_CHARS <= len(text) <= _MAX_CHARS:
        return False
    prose = sum(map(str.isalpha, text)) + sum(map(str.isspace, text))
    return prose >= _MIN_PROSE_SHARE * len(text)
