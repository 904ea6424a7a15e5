"""No text of this repository points at a file that is not in it.

Checked are the relative links of every Markdown file, and every Python or Markdown file that is named in
Markdown, in a TOML file's comments, or in a Python file's docstrings and comments; in the packages also a page
of docs that a message names. A name may leave out leading folders: it must be the end of a tracked path.
"""

import ast
import functools
import io
import posixpath
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Files that the text names although they are not ours: programs write them, or other projects have them.
ELSEWHERE: frozenset[str] = frozenset()

_PACKAGES = ("pilot/", "nanochat/", "scripts/", "benchmarks/")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_URL = re.compile(r"[a-z]+:", re.IGNORECASE)
# not in a URL, an absolute path, a glob, or behind a placeholder such as <name> or $HOME
_NAME = re.compile(
    r"(?<![\w./:~$<>{}*@…-])((?:\.\./)*(?:[\w-]+/)*[\w-]+\.(?:py|md))(?![\w/*-])(?!\.\w)"
)
_PAGE = re.compile(r"(?<![\w./-])docs/[\w-]+\.md\b")


def dead_pointers(path: str, text: str, tracked: tuple[str, ...]) -> list[str]:
    """`path:line: pointer` of each pointer in `text`, the content of `path`, that is in none of `tracked`."""
    files, tails, folders = _places(tracked)
    dead = []
    for line, pointer, is_link in sorted(set(_pointers(path, text))):
        here = posixpath.normpath(posixpath.join(posixpath.dirname(path), pointer))
        found = here in folders if is_link else pointer in tails or pointer in ELSEWHERE
        if not found and here not in files:
            dead.append(f"{path}:{line}: {pointer}")
    return dead


@functools.cache
def _places(tracked: tuple[str, ...]) -> tuple[set[str], set[str], set[str]]:
    """(files, all ends of their paths, their folders)."""
    tails = {"/".join(p.split("/")[i:]) for p in tracked for i in range(p.count("/") + 1)}
    folders = {p[:i] for p in tracked for i, letter in enumerate(p) if letter == "/"}
    return set(tracked), tails, folders


def _pointers(path: str, text: str) -> Iterator[tuple[int, str, bool]]:
    """(line, pointer, whether it is a link) of everything in `text` that points at a file."""
    if path.endswith(".py") and ".py" not in text and ".md" not in text:
        return  # most files, and tokenizing takes time
    for first_line, prose in _prose(path, text):
        for offset, line in enumerate(prose.splitlines()):
            number = first_line + offset
            if path.endswith(".md"):
                for link in _LINK.findall(line):
                    target = link.partition("#")[0]
                    if target and not _URL.match(target):
                        yield number, target, True
                line = _LINK.sub("]", line)
            for name in _NAME.findall(line):
                yield number, name, False
    if path.endswith(".py") and path.startswith(_PACKAGES):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for page in _PAGE.findall(node.value):
                    yield node.lineno, page, False


def _prose(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of what is written for people in a file."""
    if path.endswith(".md"):
        yield 1, text
        return
    if path.endswith(".toml"):
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line.partition("#")[2]
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            assert isinstance(statement.value, ast.Constant)
            yield statement.lineno, str(statement.value.value)


@pytest.fixture(scope="module")
def tracked() -> tuple[str, ...]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return tuple(listing.stdout.rstrip("\0").split("\0"))


def test_every_pointer_leads_to_a_file_of_the_repository(tracked: tuple[str, ...]) -> None:
    dead = []
    for path in tracked:
        if path.endswith((".md", ".py", ".toml")) and (ROOT / path).exists():
            dead += dead_pointers(path, (ROOT / path).read_text(encoding="utf-8"), tracked)
    assert not dead, "these point at nothing:\n" + "\n".join(dead)


def test_the_map_names_every_file_of_every_room_of_pilot(tracked: tuple[str, ...]) -> None:
    """docs/architecture.md has a row for each folder, with each of its files and no other."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:`([a-z_]+)/`|top) \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    named = {
        room: set(re.findall(r"`([\w.]+\.(?:py|css|js))`", files))
        for room, files in rows
        if ".py" in files
    }
    there: dict[str, set[str]] = {}
    for path in tracked:
        folder, _, name = path.rpartition("/")
        if re.fullmatch(r"pilot(/\w+)?", folder) and not name.startswith("__"):
            there.setdefault(folder.removeprefix("pilot").strip("/"), set()).add(name)
    assert named == there


# -- the finder itself -------------------------------------------------------------------------------

TRACKED = ("README.md", "docs/guide.md", "pilot/wire/codec.py", "pilot/cli.py", "tests/test_cli.py")


@pytest.mark.parametrize(
    ("path", "text", "dead"),
    [
        ("README.md", "see [the guide](docs/guide.md#top), [a site](https://x.org/y.md)", []),
        ("README.md", "see\n[the guide](docs/gone.md)", ["README.md:2: docs/gone.md"]),
        ("docs/guide.md", "[up](../README.md) [here](#words) [folder](../pilot/wire)", []),
        ("docs/guide.md", "[up](README.md)", ["docs/guide.md:1: README.md"]),
        ("docs/guide.md", "`codec.py`, `wire/codec.py`, pilot/cli.py:88 and guide.md.", []),
        ("docs/guide.md", "in `wire/cli.py`", ["docs/guide.md:1: wire/cli.py"]),
        ("docs/guide.md", "`<name>.py`, `*.md`, /etc/x.py, ~/y.py, x.pyi, https://x.org/z.py", []),
        ("docs/guide.md", "../shared/plan.md", ["docs/guide.md:1: ../shared/plan.md"]),
        (
            "pilot/cli.py",
            '"""What it does (docs/guide.md)."""\nx = "gone.md"  # see codec.py\n',
            [],
        ),
        ("pilot/cli.py", '"""One.\n\nTwo: GONE.md.\n"""\n', ["pilot/cli.py:3: GONE.md"]),
        ("pilot/cli.py", "x = 1\nx = 2  # as gone.py says\n", ["pilot/cli.py:2: gone.py"]),
        ("pilot/cli.py", 'def f():\n    """As in gone.py."""\n', ["pilot/cli.py:2: gone.py"]),
        ("pilot/cli.py", 'print(f"{1}: see docs/gone.md")\n', ["pilot/cli.py:1: docs/gone.md"]),
        ("tests/test_cli.py", 'x = "docs/gone.md"\n', []),
        ("a.toml", 'x = "gone.py"\n# as gone.md says\n', ["a.toml:2: gone.md"]),
    ],
)
def test_the_finder_sees_dead_pointers_and_nothing_else(
    path: str, text: str, dead: list[str]
) -> None:
    assert dead_pointers(path, text, TRACKED) == dead
