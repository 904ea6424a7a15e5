"""`pilot status`, `runs`, `logs`, `stop`, `drain`, `undrain` on files and a real Redis, without federation."""

import json
import threading
from pathlib import Path

import pytest
import redis

from pilot.cli import main
from pilot.wire.messages import Heartbeat

from ...waiting import until
from ..coordinator_kit import client, server
from ..page.story_kit import BEGAN, SHORT, event, write_run


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("PILOT_REDIS_URL", raising=False)
    return tmp_path


def test_the_last_run_is_shown_from_its_directory_alone(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(base / "runs" / "old", [event(0, "run_started", run="old", term=1)])
    (base / "runs" / "short").symlink_to(SHORT)
    assert main(["status", "short", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["round_number"]) == ("short", "finished", 17)
    assert main(["runs", "--json"]) == 0
    lines = {line["run"]: line for line in json.loads(capsys.readouterr().out)}
    assert (lines["short"]["state"], lines["short"]["tokens"]) == ("finished", 1111040)
    assert (lines["old"]["state"], lines["old"]["where"]) == ("lost", "here")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["status", "nobody"], "there is no run nobody, neither in"),
        (["status"], "there is no run in"),
        (["stop", "r"], "no Redis is known here: set PILOT_REDIS_URL"),
        (["drain", "a"], "no Redis is known here"),
        (["stop", "../r"], 'RUN "../r" must start with'),
        (["drain", "a b"], 'CLIENT "a b" must start with'),
        (["logs"], "there are no logs in"),
        (["logs", "nobody"], "there is no run in"),
        (["logs", "-n", "-1"], "it must be 0 or more"),
    ],
)
def test_a_mistake_is_one_sentence(
    base: Path, capsys: pytest.CaptureFixture[str], command: list[str], sentence: str
) -> None:
    assert main(command) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_redis_is_found_in_the_file_of_the_fleet_and_the_environment_wins(
    base: Path, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = server(redis_url, base)
    (base / "fleet").mkdir()
    text = f"# of pilot up\nFLWR_HOME=/x\nPILOT_REDIS_URL='{redis_url}'\nbroken 'line\n"
    (base / "fleet" / "environment").write_text(text)
    (base / "fleet" / "environment").chmod(0o644)
    assert main(["drain", "a"]) == 2
    assert "others have access to it" in capsys.readouterr().err
    (base / "fleet" / "environment").chmod(0o600)
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "r"
    monkeypatch.setenv("PILOT_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    assert main(["drain", "a"]) == 2
    error = capsys.readouterr().err
    assert "cannot reach Redis" in error and "secret" not in error
    leader.finish()


def test_a_wish_is_a_key_and_only_for_those_who_are_there(
    base: Path, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_REDIS_URL", redis_url)
    assert main(["drain", "c"]) == 2 and "no run is led now" in capsys.readouterr().err
    assert main(["stop", "r"]) == 2 and "knows of no run r" in capsys.readouterr().err
    leader = server(redis_url, base)
    leader.open_round(1)
    with client(redis_url) as half, redis.Redis.from_url(redis_url, decode_responses=True) as raw:
        half.send_heartbeat(Heartbeat("training"), expiry_s=60)
        assert main(["drain", "typo"]) == 2
        assert "is called typo; there are: c" in capsys.readouterr().err
        assert main(["drain", "c", "--reason", "new disks"]) == 0
        assert half.told_to_leave() == "drained: new disks"
        assert leader.draining(["c", "d"]) == {"c": "drained: new disks"}
        assert raw.ttl("pilot:r:stop:c") > 29 * 24 * 3600
        assert main(["status", "r"]) == 0 and "drained: new disks" in capsys.readouterr().out
        assert main(["undrain", "c"]) == 0
        assert leader.draining(["c"]) == {} and half.told_to_leave() is None
        raw.set("pilot:r:stop:c", "maintenance")
        assert main(["undrain", "c"]) == 1, "another reason is not the operator's to take back"
        assert "still leaves run r: maintenance" in capsys.readouterr().out
        assert raw.get("pilot:r:stop:c") == "maintenance"
    leader.finish()
    assert (
        main(["stop", "r"]) == 2 and "run r was stopped: nobody leads it" in capsys.readouterr().err
    )


def test_stop_waits_until_the_run_has_ended(
    base: Path, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_REDIS_URL", redis_url)
    leader = server(redis_url, base)
    leader.open_round(1)

    def end() -> None:
        until(lambda: leader.stop_wish() == "dear")
        leader.finish()

    ending = threading.Thread(target=end)
    ending.start()
    assert main(["stop", "r", "--reason", "dear"]) == 0
    ending.join()
    assert "Run r was stopped; the same command resumes it" in capsys.readouterr().out
    with redis.Redis.from_url(redis_url) as raw:
        assert not raw.exists("pilot:r:stop"), "the next server would stop at once"


def test_a_drain_outlives_a_redis_that_loses_everything_but_not_what_takes_it_back(
    base: Path, redis_url: str
) -> None:
    leader = server(redis_url, base)
    leader.open_round(1)
    with redis.Redis.from_url(redis_url, decode_responses=True) as raw:
        raw.set("pilot:r:stop:c", "drained: x")
        assert leader.draining(["c"]) == {"c": "drained: x"}
        raw.flushdb()
        assert leader.draining(["c"]) == {}
        leader.tick()
        assert leader.draining(["c"]) == {"c": "drained: x"}
        raw.delete("pilot:r:stop:c")
        raw.delete("pilot:r:server")  # the server stood still for so long that its lock expired
        leader.tick()
        assert leader.draining(["c"]) == {}


def test_logs_of_the_fleet_and_of_the_run_are_one_stream_by_time(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    logs = base / "fleet" / "logs"
    logs.mkdir(parents=True)
    stamp = "2023-11-14 22:13:2{}"  # BEGAN is 22:13:20
    lines = [stamp.format("1,500 | connected"), "  a line of the same", stamp.format("3,0 | bye")]
    (logs / "site-a.log").write_text("\n".join(lines) + "\n")
    (logs / "superlink.log").write_text(stamp.format("2,000 | site-a came\n") + "torn")
    write_run(
        base / "runs" / "r",
        [
            event(0, "run_started", run="r"),
            event(1, "client_silent", client="site-a", message="Client site-a is silent"),
            event(2.5, "round_ended", message="[ROUND 1] ended: x"),
        ],
    )
    assert int(BEGAN) == 1_700_000_000
    assert main(["logs", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["from"], one["line"]) for one in found] == [
        ("r", "Client site-a is silent"),
        ("site-a", "connected"),
        ("site-a", "  a line of the same"),
        ("superlink", "site-a came"),
        ("r", "[ROUND 1] ended: x"),
        ("site-a", "bye"),
    ]
    assert main(["logs", "--client", "site-a", "-n", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in shown] == ["site-a came", "bye"]
