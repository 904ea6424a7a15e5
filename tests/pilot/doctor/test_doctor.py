"""`pilot doctor` on this machine: real probes, a real Redis, and a machine that is not as it should be."""

import http.server
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from pilot.cli import main
from pilot.doctor import Level, probes, quick_checks
from pilot.doctor.facts import TorchFacts
from pilot.processes.local_redis import LocalRedis
from pilot.status.sources import base_directory


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("PILOT_REDIS_URL", raising=False)


def test_the_quick_checks_need_no_torch_and_nothing_of_anybody(redis_url: str) -> None:
    found = quick_checks(url=redis_url)
    assert {one.what for one in found} >= {"Python", "write permissions", "disk", "Redis", "clock"}
    assert {one.level for one in found if one.what != "disk"} <= {Level.OK}
    assert "Redis" not in {one.what for one in quick_checks(url="")}
    assert base_directory().is_dir()


def test_a_redis_that_is_full_or_away_is_something_to_be_done_and_shows_no_password(
    tcp_redis: LocalRedis,
) -> None:
    with redis.Redis.from_url(tcp_redis.url) as operator:
        operator.config_set("maxmemory", "1")
        found = {one.what: one for one in quick_checks(url=tcp_redis.url)}
        operator.config_set("maxmemory", "0")
    assert found["Redis writes"].level is Level.FIX
    away = quick_checks(url="redis://:hunter2@127.0.0.1:1/0")
    lines = " ".join(one.line() for one in away)
    assert "to do      Redis: cannot reach Redis" in lines and "hunter2" not in lines


def test_a_clock_is_compared_with_that_of_redis(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(probes.time, "time", lambda: now() + 60.0)
    assert probes.probe_clock(redis_url).ahead_s == pytest.approx(60.0, abs=5.0)
    assert {one.level for one in quick_checks(url=redis_url) if one.what == "clock"} == {Level.FIX}


def test_without_redis_the_clock_is_compared_with_the_date_of_a_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(now())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        (found,) = [one for one in quick_checks(url="", superlink=url) if one.what == "clock"]
        assert found.level is Level.OK and url in found.text, "an error has a date, too"
        monkeypatch.setattr(probes.time, "time", lambda: now() + 60.0)
        assert probes.probe_clock("", url).ahead_s == pytest.approx(60.0, abs=5.0)
    finally:
        server.shutdown()
        server.server_close()
    assert "does not tell its date" in probes.probe_clock("", url).why


def test_the_doctor_says_what_must_be_done_and_its_exit_code_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "probe_torch", lambda: TorchFacts(version="2.9", devices=()))
    (tmp_path / "base").write_text("a file")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "nowhere"))
    assert main(["doctor", "--json", "--app", str(tmp_path)]) == 1
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["write permissions"]["level"] == "to do"
    assert found["Flower's connection"]["level"] == "to do"
    assert (found["devices"]["level"], found["Redis"]["level"]) == ("ok", "not known")
    assert main(["doctor", "--for-config", "depht=3"]) == 2
    assert "depht" in capsys.readouterr().err


def test_a_child_that_dies_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probes.subprocess.run

    def run(command: list[str], **values: Any) -> Any:
        body = {
            "torch": "import os; os.kill(os.getpid(), 11)",
            "data": "import time; time.sleep(60)",
        }
        return real([command[0], "-c", body[command[3]]], **values)

    monkeypatch.setattr(probes.subprocess, "run", run)
    assert "it ended with signal 11" in probes.probe_torch().error
    monkeypatch.setattr(probes, "CHILD_S", 0.2)
    assert probes.ask_child("data") == {"error": "it did not answer within 0 s"}


def test_the_child_says_what_torch_data_and_sizes_are() -> None:
    from pilot.config import RunConfig
    from pilot.doctor import child

    torch = child.about_torch()
    assert torch["version"] and torch["devices"] == []
    config = RunConfig.from_mapping({"depth": 2, "vocab-size": 512, "sequence-len": 128})
    sizes = child.about_sizes(json.dumps(config.to_mapping()), "1")
    assert sizes["server_disk"] > 0 and sizes["site_memory"] > 0
    found = child.about_data(json.dumps(config.to_mapping()))
    assert "tokenizer" in found["error"] or "shard" in found["error"]
