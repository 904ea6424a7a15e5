"""Time comes in as a `Clock`: tests of the server can make hours pass in a moment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PILOT = Path(__file__).resolve().parents[2] / "pilot"


def uses_of_time(source: str) -> Iterator[str]:
    """Calls into the module `time`, however it was imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield ", ".join(alias.name for alias in node.names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = node.func.value
            if isinstance(module, ast.Name) and module.id == "time":
                yield f"time.{node.func.attr}"


def test_a_use_of_time_is_found() -> None:
    source = "import time\nfrom time import sleep\ntime.monotonic()\nclock = time.time\n"
    assert sorted(uses_of_time(source)) == ["sleep", "time.monotonic"]


@pytest.mark.parametrize("room", ["server", "coordination"])
def test_server_and_coordination_neither_sleep_nor_read_time_by_themselves(room: str) -> None:
    files = sorted((PILOT / room).glob("*.py"))
    found = {path.name: list(uses_of_time(path.read_text())) for path in files}
    assert files and not any(found.values()), found
