"""Alerts: what is posted, that nothing waits for it, and that the address stays secret."""

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from pilot.config import RunConfig
from pilot.errors import ConfigError
from pilot.processes.scratch import free_port
from pilot.run.changes import keeping_its_values
from pilot.run.events import read_events
from pilot.server import alerts
from pilot.server.alerts import Alerts, alert_url, disk_nearly_full
from pilot.server.telemetry import Telemetry
from pilot.server_app import _followers

SECRET = "s3cret-path"


class Hook:
    """A webhook on this machine; `answer` is its status."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answer = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                hook.bodies.append(json.loads(body))
                self.send_response(hook.answer)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.close()


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "_PAUSE_S", 0.0)


def telemetry(directory: Path, url: str, **options: Any) -> Telemetry:
    config = RunConfig(run_name="r", alert_url=url)
    options = {"wandb_mode": "disabled", "wandb_project": "", **options}
    return Telemetry(
        directory,
        config_dict=config.to_mapping(),
        run_name="r",
        alerts=Alerts(url, "r", directory),
        **options,
    )


def committed(stream: Telemetry, number: int, *, clients: int, loss: float | None) -> None:
    stream.event("round_committed", round_number=number, clients=clients, train_loss=loss)


def test_what_somebody_should_know_is_posted_as_json(hook: Hook, tmp_path: Path) -> None:
    with telemetry(tmp_path, hook.url, clock=lambda: 12.5) as stream:
        stream.event("client_silent", "Client a is silent", round=3, client="a")
        stream.event("client_silent", "Client a is silent", round=4, client="a")  # known already
        stream.event("client_silent", "Client b is silent", round=4, client="b")
        committed(stream, 5, clients=2, loss=2.0)
        committed(stream, 6, clients=0, loss=None)
        committed(stream, 7, clients=1, loss=float("nan"))
        stream.event("reply_refused", round=7, client="b", reason="w is not finite")
        stream.event("run_finished", rounds=7, tokens=1)
    first = hook.bodies[0]
    assert first == {
        "alert": "client-silent",
        "run": "r",
        "text": "r: Client a is silent",
        "time": 12.5,
        "round": 3,
        "client": "a",
    }
    said = [(body["alert"], body.get("client"), body.get("round")) for body in hook.bodies]
    assert said == [
        ("client-silent", "a", 3),
        ("client-silent", "b", 4),
        ("nothing-merged", None, 6),
        ("not-finite", None, 7),
        ("not-finite", "b", 7),
        ("run-finished", None, None),
    ]


def test_a_run_that_ends_with_an_error_says_so(hook: Hook, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), telemetry(tmp_path, hook.url):
        raise RuntimeError("boom")
    assert [body["alert"] for body in hook.bodies] == ["run-ended"]


@pytest.mark.parametrize("how", ["nobody listens", "it refuses"])
def test_an_unreachable_hook_is_said_once_without_its_address(
    how: str, hook: Hook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = hook.url
    if how == "it refuses":
        hook.answer = 500
    else:
        url = f"http://user:hunter2@127.0.0.1:{free_port()}/{SECRET}?key={SECRET}"
    with telemetry(tmp_path, url) as stream:
        for client in "abc":
            stream.event("client_silent", round=1, client=client)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "alerts do not reach 127.0.0.1" in said[0]
    everything = "".join(record.getMessage() for record in caplog.records if record.name == "pilot")
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in everything + written
    assert "hunter2" not in everything + written


def test_a_hook_that_never_answers_delays_nothing_and_alerts_are_bounded(tmp_path: Path) -> None:
    begun, release = threading.Event(), threading.Event()
    taken: list[Mapping[str, Any]] = []

    def stuck(url: str, body: Mapping[str, Any]) -> None:
        begun.set()
        release.wait()
        taken.append(body)

    follower = Alerts("http://h/", "r", tmp_path, send=stuck)
    record = {"event": "client_silent", "time": 1.0, "round": 1}
    follower.event(record | {"client": "first"})
    begun.wait()
    for i in range(1000):  # each returns although nothing is taken
        follower.event(record | {"client": f"c{i}"})
    assert follower._background.dropped == 1000 - alerts.MOST_WAITING
    release.set()
    follower.close(exit_code=0, now=1.0)
    assert len(taken) == 1 + alerts.MOST_WAITING
    assert taken[-1]["client"] == "c999"  # the oldest were dropped


def test_a_disk_with_room_for_less_than_two_snapshots_is_nearly_full(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "round-000001"
    snapshot.mkdir(parents=True)
    (snapshot / "model").write_bytes(bytes(1000))

    def disk(free: int) -> str:
        return disk_nearly_full(tmp_path, lambda _: SimpleNamespace(free=free, total=10_000))

    assert disk(2000) == ""
    assert "nearly full" not in disk(1999) and "The disk of the run's directory has" in disk(1999)
    assert disk_nearly_full(tmp_path / "gone", lambda _: SimpleNamespace(free=9, total=10)) == ""


def test_a_full_disk_is_an_alert(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "disk_nearly_full", lambda _: "The disk has 0.1 GB left")
    with telemetry(tmp_path, hook.url) as stream:
        committed(stream, 5, clients=2, loss=2.0)
    assert [body["alert"] for body in hook.bodies] == ["disk-nearly-full"]


def test_the_environment_comes_first_and_no_mistake_shows_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert alert_url("https://h/configured") == "https://h/configured"
    monkeypatch.setenv("PILOT_ALERT_URL", "https://h/of-the-environment")
    assert alert_url("https://h/configured") == "https://h/of-the-environment"
    for wrong in (
        f"ftp://h/{SECRET}",
        f"https:///{SECRET}",
        f"http://h:99999/{SECRET}",
        f"h/{SECRET} ",
    ):
        monkeypatch.setenv("PILOT_ALERT_URL", wrong)
        with pytest.raises(ConfigError, match="PILOT_ALERT_URL must be an address") as caught:
            alert_url("")
        assert SECRET not in str(caught.value)
        with pytest.raises(ConfigError, match="alert-url must be an address") as caught:
            RunConfig.from_mapping({"alert-url": wrong})
        assert SECRET not in str(caught.value)


def test_a_redirection_is_not_followed(hook: Hook) -> None:
    hook.answer = 307
    with pytest.raises(requests.RequestException, match="it answers 307"):
        alerts.post(hook.url, {"a": 1})


def test_the_address_is_in_no_order_and_no_snapshot() -> None:
    config = RunConfig.from_mapping({"alert-url": f"https://h/{SECRET}"})
    assert config.to_mapping()["alert-url"] == ""  # what orders, snapshots, W&B and the log get
    assert SECRET in asdict(config)["alert_url"]


def test_events_are_written_whatever_an_alert_makes_of_them(tmp_path: Path, hook: Hook) -> None:
    with telemetry(tmp_path, hook.url) as stream:
        stream.event("run_finished")  # without the field that its text needs
    assert [event["event"] for event in read_events(tmp_path / "events.jsonl")] == ["run_finished"]


def test_a_resumed_run_keeps_its_webhook_though_no_snapshot_holds_it() -> None:
    asked = RunConfig.from_mapping({"alert-url": f"https://h/{SECRET}"})
    kept = keeping_its_values({}, asked)  # a run that was begun with the defaults of before
    assert kept.to_mapping() != asked.to_mapping()
    assert kept.alert_url == asked.alert_url


def test_the_run_configuration_says_who_follows_the_run(tmp_path: Path) -> None:
    assert _followers(RunConfig(), tmp_path) == {}
    port = free_port()
    asked = RunConfig(run_name="r", alert_url="https://h/x", prometheus_port=port)
    found = _followers(asked, tmp_path)
    assert sorted(found) == ["alerts", "prometheus"]
    assert found["prometheus"].port == port
    found["prometheus"].close()
