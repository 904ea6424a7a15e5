"""No file and no function grows until it has two jobs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nanochat", "scripts", "pilot")
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 70
# Functions that may be longer, each with its reason
EXCEPTIONS: dict[str, str] = {}

FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_longer_than_a_reader_can_hold(package: str) -> None:
    lengths = {
        path.name: len(path.read_text().splitlines()) for path in FILES if _in(path, package)
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MOST_FILE_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_does_more_than_one_thing(package: str) -> None:
    too_long = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        if _in(path, package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
    }
    assert {name: lines for name, lines in too_long.items() if name not in EXCEPTIONS} == {}


def _in(path: Path, package: str) -> bool:
    return path.relative_to(ROOT).parts[0] == package
