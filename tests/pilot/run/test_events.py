"""`events.jsonl`: its readers, and that docs/events.md says what is in it, of the code and of real runs."""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pilot.rules.energy import Footprint
from pilot.run.changes import ConfigChange
from pilot.run.events import EVENTS_VERSION, NewEvents, read_events
from pilot.run.state import RoundRecord
from pilot.wire.messages import TrainReply

ROOT = Path(__file__).resolve().parents[3]
RUNS = sorted((ROOT / "tests/pilot/page/runs").glob("*/events.jsonl"))
PAGE = (ROOT / "docs/events.md").read_text(encoding="utf-8")
_CALLS = ("event", "_client_event")
# what `Report._client_event` adds, and the dataclasses that some calls unfold: real runs show those
_ADDED = {"_client_event": {"round", "client"}}
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "text": (str,),
    "bool": (bool,),
    "list": (list,),
    "object": (dict,),
    "any": (object,),
}


def documented() -> dict[str, dict[str, str]]:
    """Kind → field → type, as the page has them."""
    kinds: dict[str, dict[str, str]] = {}
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        kind = section.partition("\n")[0]
        rows = re.findall(r"^\| (`\w+`|any other) \| ([^|]+) \|", section, flags=re.MULTILINE)
        kinds[kind] = {name.strip("`"): form.strip() for name, form in rows}
    return kinds


KINDS = documented()
COMMON = KINDS.pop("All events")


def emitted() -> Iterator[tuple[str, str, set[str]]]:
    """(where, kind, its named fields) of each place in the code that records an event."""
    for path in sorted((ROOT / "pilot").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in _CALLS or not node.args:
                continue
            kind, place = node.args[0], f"{path.relative_to(ROOT)}:{node.lineno}"
            if isinstance(kind, ast.Name):
                continue  # it passes on the kind that it was called with
            assert isinstance(kind, ast.Constant), f"{place}: which kind of event?"
            fields = {word.arg for word in node.keywords if word.arg}
            yield place, str(kind.value), fields | _ADDED.get(node.func.attr, set())


def test_every_event_that_the_code_records_is_in_the_document() -> None:
    found = list(emitted())
    assert len({kind for _, kind, _ in found}) > 20
    missing = [f"{place}: {kind}" for place, kind, _ in found if kind not in KINDS]
    assert missing == []
    missing = [
        f"{place}: {kind}.{name}"
        for place, kind, fields in found
        for name in fields - set(KINDS[kind])
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("kind", "unfolded"),
    [
        ("reply", TrainReply),
        ("round_committed", RoundRecord),
        ("config_changed", ConfigChange),
        ("energy", Footprint),
    ],
)
def test_every_field_of_a_dataclass_that_is_recorded_is_in_the_document(
    kind: str, unfolded: Any
) -> None:
    assert {one.name for one in dataclasses.fields(unfolded)} <= set(KINDS[kind])


def complaints(event: dict[str, Any]) -> list[str]:
    """In what `event` is not what the page says."""
    fields = COMMON | KINDS.get(event["event"], {})
    found = [
        f"{name} is missing"
        for name, form in fields.items()
        if name not in event and "optional" not in form and name != "any other"
    ]
    for name, value in event.items():
        form = fields.get(name) or fields.get("any other")
        if form is None:
            found.append(f"{name} is not documented")
            continue
        kind, nullable = form.partition(",")[0].rstrip("?"), "?" in form
        fits = isinstance(value, _TYPES[kind]) and (kind == "bool") == isinstance(value, bool)
        if not (fits or kind == "any" or (value is None and nullable)):
            found.append(f"{name} is {value!r}, not {form}")
    return [f"{event['event']}: {text}" for text in found]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_the_events_of_real_runs_of_any_version_are_what_the_document_says(path: Path) -> None:
    events = list(read_events(path))
    assert len(events) > 100
    assert {event["event"] for event in events} <= set(KINDS)
    assert sorted({text for event in events for text in complaints(event)}) == []


def test_the_document_has_the_version_of_the_code() -> None:
    assert f"This page is version {EVENTS_VERSION} of the format" in PAGE
    assert complaints({"time": 1.0, "event": "idle", "cause": 3, "seconds": True, "odd": 1}) == [
        "idle: round is missing",
        "idle: cause is 3, not text",
        "idle: seconds is True, not float",
        "idle: odd is not documented",
    ]


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_file_that_grows_is_read_on_from_where_the_last_read_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, '{"event": "a"}\n{"event": "b"}\n{"ev')
    tail = NewEvents(path)
    assert [event["event"] for event in tail.read()] == ["a", "b"]
    assert (tail.offset, tail.size) == (30, 34)
    assert tail.read() == []
    append(path, 'ent": "c"}\nnot json\n[1]\n')
    assert [event["event"] for event in tail.read()] == ["c"]
    assert tail.offset == tail.size == path.stat().st_size
    assert tail.files == 1


def test_one_read_is_bounded_and_a_line_beyond_the_bound_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [json.dumps({"event": str(i)}) for i in range(100)]
    lines.insert(50, json.dumps({"event": "x" * 1000}))
    append(path, "\n".join(lines) + "\n")
    tail = NewEvents(path, most_bytes=100)
    found: list[str] = []
    for _ in range(60):
        read = [event["event"] for event in tail.read()]
        assert len(read) <= 8
        found += read
    assert found == [str(i) for i in range(100)]


def test_another_file_of_the_same_name_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append(path, '{"event": "old"}\n{"event": "old"}\n')
    tail = NewEvents(path)
    tail.read()
    path.write_text('{"event": "new"}\n')
    assert [event["event"] for event in tail.read()] == ["new"]
    assert tail.files == 2
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tail.read()
