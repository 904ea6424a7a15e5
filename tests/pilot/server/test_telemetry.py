"""Telemetry writes everything and breaks nothing."""

import json
import logging
import subprocess
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pilot.run.events import read_events
from pilot.server import telemetry
from pilot.server.console import configure_logging
from pilot.server.telemetry import Telemetry
from pilot.wire.jsonable import jsonable, redact

from ...nanochat.data_kit import full_disk


@pytest.fixture(autouse=True)
def plain_logger() -> Any:
    logger = logging.getLogger("pilot")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = True
    yield
    logger.handlers[:] = handlers
    logger.propagate = propagate


def make(run_dir: Path, mode: str = "disabled", **options: Any) -> Telemetry:
    options = {"config_dict": {}, "wandb_project": "tests", "run_name": "run", **options}
    return Telemetry(run_dir, wandb_mode=mode, **options)


class FakeRun:
    def __init__(self, fail_on: str = "") -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.fail_on = fail_on

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fail_on == "log":
            raise RuntimeError("boom in log")
        self.logged.append((values, step))

    def finish(self, exit_code: int) -> None:
        if self.fail_on == "finish":
            raise RuntimeError("boom in finish")


class FakeWandb(types.ModuleType):
    """The two names of wandb that we use; remembers what init() was told."""

    def __init__(self, *, failing_modes: tuple[str, ...] = (), fail_on: str = "") -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.run = FakeRun(fail_on)
        self.failing_modes = failing_modes

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, **options: Any) -> FakeRun:
        self.inits.append(options)
        if options["mode"] in self.failing_modes:
            raise RuntimeError("no way to wandb at https://me:key@wandb.example")
        return self.run


def fake(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeWandb:
    module = FakeWandb(**options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_an_event_is_a_line_of_json_at_once_and_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = make(tmp_path, clock=lambda: 12.5)
    stream.event("merged", "round=3 val_bpb=1.9876 100%", round=3, val_bpb=1.9876)
    line = (tmp_path / "events.jsonl").read_text()
    assert json.loads(line) == {
        "time": 12.5,
        "event": "merged",
        "message": "round=3 val_bpb=1.9876 100%",
        "round": 3,
        "val_bpb": 1.9876,
    }
    assert line.endswith("\n")
    assert caplog.messages == ["round=3 val_bpb=1.9876 100%"]


def test_values_of_any_type_are_written(tmp_path: Path) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise ValueError("no string")

    class Colour(Enum):
        RED = 1

    cycle: list[Any] = []
    cycle.append(cycle)
    make(tmp_path).event(
        "odd",
        nan=float("nan"),
        inf=np.float32("inf"),
        numpy=np.int64(3),
        half=torch.tensor(0.5),
        nested={"a": (np.float64(1.5), None)},
        vector=torch.tensor([1.0, float("nan")]),
        path=tmp_path,
        data=b"\xff",
        colour=Colour.RED,
        cycle=cycle,
        hostile=Hostile(),
        time="mine",
        surrogate="\ud800",
    )
    (record,) = read_events(tmp_path / "events.jsonl")
    assert record["nan"] is None
    assert record["inf"] is None
    assert (record["numpy"], record["half"]) == (3, 0.5)
    assert record["nested"] == {"a": [1.5, None]}
    assert record["vector"] == [1.0, None]
    assert record["path"] == str(tmp_path)
    assert record["time_"] == "mine"
    assert record["surrogate"] == "\ud800"
    assert "Hostile" in record["hostile"]


def test_a_torn_line_hides_neither_what_came_before_nor_after(tmp_path: Path) -> None:
    make(tmp_path).event("before")
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": 1, "eve')
    assert [record["event"] for record in read_events(path)] == ["before"]
    make(tmp_path).event("after")
    assert [record["event"] for record in read_events(path)] == ["before", "after"]
    assert list(read_events(tmp_path / "missing")) == []


def test_credentials_stay_out_of_events_and_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = "redis://user:hunter2@host:6379/0"
    make(tmp_path).event("start", f"using {url}", url=url, nested={"urls": [url]})
    assert "hunter2" not in (tmp_path / "events.jsonl").read_text()
    assert "hunter2" not in caplog.text
    assert "host:6379" in caplog.text
    assert "hunter2" not in redact("see unix:///run/redis.sock?password=hunter2, or not")
    assert redact("mail me@example.org, see https://example.org/a") == (
        "mail me@example.org, see https://example.org/a"
    )


def test_a_full_disk_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = make(tmp_path)
    stream.events_path = tmp_path / "gone" / "events.jsonl"
    stream.event("one")
    stream.event("two")
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_line_that_did_not_fit_is_no_part_of_the_next_one(tmp_path: Path) -> None:
    stream = make(tmp_path)
    stream.event("before")
    with full_disk(stream.events_path.stat().st_size + 10):  # takes the first bytes of a line
        stream.event("lost")
    stream.event("after")
    assert [event["event"] for event in read_events(stream.events_path)] == ["before", "after"]


@pytest.mark.parametrize(("key", "mode"), [("secret", "online"), ("", "offline")])
def test_wandb_is_online_with_a_key_and_offline_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, mode: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    wandb = fake(monkeypatch)
    config = {"redis-url": "redis://:hunter2@host:1"}
    with make(tmp_path, "auto", wandb_id="abc", config_dict=config) as stream:
        stream.metrics(7, loss=np.float32(1.5), bad=float("nan"))
    assert stream.wandb_id == "abc"
    (init,) = wandb.inits
    assert (init["mode"], init["id"], init["dir"]) == (mode, "abc", str(tmp_path))
    assert "hunter2" not in str(init["config"])
    assert wandb.run.logged == [({"loss": 1.5}, 7)]
    (record,) = read_events(stream.events_path)
    assert (record["event"], record["step"], record["loss"], record["bad"]) == (
        "metrics",
        7,
        1.5,
        None,
    )


def test_wandb_disabled_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    with make(tmp_path, "disabled") as stream:
        stream.metrics(1, loss=1.0)
    assert wandb.inits == []
    assert stream.wandb_id


def test_wandb_that_cannot_be_reached_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = fake(monkeypatch, failing_modes=("online",))
    with make(tmp_path, "online") as stream:
        stream.metrics(1, loss=1.0)
    assert [init["mode"] for init in wandb.inits] == ["online", "offline"]
    assert len(wandb.run.logged) == 1
    assert "me:key" not in caplog.text


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_wandb_failures_cost_one_warning_and_nothing_else(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(monkeypatch, failing_modes=("offline",) if where == "init" else (), fail_on=where)
    if where == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    with make(tmp_path, "offline") as stream:
        stream.metrics(1, loss=1.0)
        stream.metrics(2, loss=1.0)
    assert [record["step"] for record in read_events(stream.events_path)] == [1, 2]
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


def test_an_endless_upload_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import threading

    wandb = fake(monkeypatch)
    release = threading.Event()
    monkeypatch.setattr(wandb.run, "finish", lambda exit_code: release.wait())
    monkeypatch.setattr(telemetry, "WANDB_FINISH_TIMEOUT_S", 0.05)
    make(tmp_path, "offline").close()
    assert "wandb sync" in caplog.text
    release.set()


def test_the_real_wandb_writes_offline_files_under_the_run_directory(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from pilot.server.telemetry import Telemetry
with Telemetry(Path({str(tmp_path)!r}), config_dict={{"depth": 4}}, wandb_mode="auto",
               wandb_project="tests", run_name="run", wandb_id="abc12345") as stream:
    stream.metrics(1, loss=2.0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()
    (files,) = (tmp_path / "wandb").glob("offline-run-*-abc12345")
    assert list(files.glob("run-abc12345.wandb"))


def test_the_console_shows_plain_lines_and_names_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging()
    configure_logging()
    logger = logging.getLogger("pilot")
    logger.info("[ROUND 2]")
    logger.warning("odd")
    logging.getLogger("pilot.site").error("bad")
    assert capsys.readouterr().out == "[ROUND 2]\nwarning: odd\nerror: bad\n"


def test_jsonable_keeps_plain_values() -> None:
    assert jsonable({"a": [1, True, None, "x", 2.5]}) == {"a": [1, True, None, "x", 2.5]}
