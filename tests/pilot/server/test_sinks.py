"""W&B, TensorBoard and Prometheus take a run's numbers, and none of them can delay or end a run."""

import logging
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pilot.errors import PilotError
from pilot.processes.scratch import free_port
from pilot.run.events import read_events
from pilot.server import sinks
from pilot.server.prometheus import Prometheus
from pilot.server.sinks import Sinks, TensorBoard, check_tensorboard
from pilot.server.telemetry import Telemetry


class Recorder:
    def __init__(self, fail_on: str = "") -> None:
        self.logged: list[int] = []
        self.finished = 0
        self._fail_on = fail_on

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        if self._fail_on == "log":
            raise RuntimeError("boom at redis://me:hunter2@h")
        self.logged.append(step)

    def finish(self, *, exit_code: int, timeout_s: float) -> None:
        self.finished += 1


def test_a_sink_that_hangs_delays_no_event_and_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As W&B does whose service cannot be reached: neither its beginning nor a log returns."""
    release, begun = threading.Event(), threading.Event()

    class Hanging(Recorder):
        def __init__(self, **_: Any) -> None:
            begun.set()
            release.wait()
            super().__init__()

    hanging: list[Hanging] = []
    monkeypatch.setattr(
        "pilot.server.telemetry.WandbRun", lambda **o: hanging.append(Hanging(**o)) or hanging[-1]
    )
    monkeypatch.setattr("pilot.server.telemetry.WANDB_FINISH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(sinks, "_LAST_WORDS_S", 0.05)
    stream = Telemetry(
        tmp_path, config_dict={}, wandb_mode="online", wandb_project="", run_name="r"
    )
    for step in range(20):  # each returns, while W&B has not even begun
        stream.metrics(step, loss=1.0)
    begun.wait()
    stream.close()
    assert not hanging
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 20
    release.set()


def test_numbers_that_nobody_takes_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "MOST_WAITING", 5)
    release, begun = threading.Event(), threading.Event()
    recorder = Recorder()

    def opening() -> Recorder:
        begun.set()
        release.wait()
        return recorder

    behind = Sinks([opening])
    behind.log({}, step=0)
    begun.wait()
    for step in range(1, 21):
        behind.log({}, step=step)
    release.set()
    behind.finish(exit_code=0, timeout_s=60.0)
    assert recorder.logged == [0, 17, 18, 19, 20]
    assert recorder.finished == 1
    assert "metrics of 16 rounds were dropped" in caplog.text


def test_a_sink_that_fails_is_left_out_and_the_others_continue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> Recorder:
        raise RuntimeError("no way")

    good, bad = Recorder(), Recorder("log")
    several = Sinks([broken, lambda: bad, lambda: good])
    several.log({}, step=1)
    several.log({}, step=2)
    several.finish(exit_code=0, timeout_s=60.0)
    assert (good.logged, good.finished, bad.finished) == ([1, 2], 1, 0)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "hunter2" not in caplog.text


def test_tensorboard_gets_every_number_of_every_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {"wandb_mode": "disabled", "wandb_project": "", "run_name": "r"}
    with Telemetry(tmp_path, config_dict={}, tensorboard=True, **options) as stream:
        stream.metrics(1, train_loss=3.5, note=None)
        stream.metrics(2, train_loss=2.5, val_bpb=1.25)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == ["train_loss", "val_bpb"]
    assert [(one.step, one.value) for one in found.Scalars("train_loss")] == [(1, 3.5), (2, 2.5)]


def test_what_is_not_installed_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(PilotError, match=r"pilot\[prometheus\]"):
        Prometheus("r", "127.0.0.1", 0)
    check_tensorboard()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PilotError, match=r"pilot\[tensorboard\]"):
        check_tensorboard()


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_prometheus_finds_the_numbers_of_the_run_and_its_clients(tmp_path: Path) -> None:
    port = free_port()
    endpoint = Prometheus("r", "127.0.0.1", port)
    options: dict[str, Any] = {"wandb_mode": "disabled", "wandb_project": "", "run_name": "r"}
    with Telemetry(tmp_path, config_dict={}, prometheus=endpoint, **options) as stream:
        stream.event("round_opened", round=3, clients=["a", 'b"\n'])
        stream.event("client_silent", round=3, client="a")
        stream.metrics(3, train_loss=2.5, val_bpb=None)
        stream.event("round_committed", speeds={"a": {"tokens_per_s": 12.0, "mfu": None}})
        found = scraped(port)
    assert found['pilot_round{run="r"}'] == 3
    assert found['pilot_last_train_loss{run="r"}'] == 2.5
    assert found['pilot_client_silent{client="a",run="r"}'] == 1
    assert found['pilot_client_tokens_per_second{client="a",run="r"}'] == 12
    assert found['pilot_events_total{event="round_opened",run="r"}'] == 1
    with pytest.raises(OSError):  # it ended with the run
        scraped(port)


def test_a_port_that_is_taken_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    first = Prometheus("r", "127.0.0.1", 0)
    second = Prometheus("r", "127.0.0.1", first.port)
    second.event({"event": "x", "time": 1.0})
    assert "cannot listen on 127.0.0.1" in caplog.text
    first.close()
    second.close()


def test_what_prometheus_holds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Prometheus("r", "127.0.0.1", 0)
    for i in range(1200):
        endpoint.event({"event": "client_silent", "time": 1.0, "client": f"c{i}"})
    endpoint.metrics({f"n{i}": 1.0 for i in range(300)})
    found = scraped(endpoint.port)
    endpoint.close()
    assert sum(name.startswith("pilot_client_silent{") for name in found) == 1000
    assert sum(name.startswith("pilot_last_n") for name in found) < 200


def test_tensorboard_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.log({"a": "text", "b": 1}, step=1)
    board.finish(exit_code=0, timeout_s=1.0)
    assert list(tmp_path.iterdir())
