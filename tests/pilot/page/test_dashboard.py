"""`pilot dashboard`: who may see what, bounded work, runs that grow; `test_browser.py` has it in a browser."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pilot import cli
from pilot.page import live
from pilot.page.dashboard import dashboard
from pilot.page.live import LiveRun, Runs
from pilot.page.markup import Markup
from pilot.page.story import NoStory, StoryReader

from .story_kit import committed, event, refusal, write_run

TOKEN = "t0ken-of-more-than-sixteen"
ROUND = [event(1, "round_opened", round=1, clients=["a"]), committed(9, 1, 100, a=[[0, 0, 0, 8]])]


def started(run: str) -> dict[str, Any]:
    return event(0, "run_started", run=run, term=1)


def grow(run: Path, *events: dict[str, Any]) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in events)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        write_run(tmp_path / name, [started(name), *ROUND])
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def client(runs: Path, *, token: str | None = None, host: str = "localhost") -> TestClient:
    app = dashboard(Runs(runs), "var vega;", token=token)
    return TestClient(app, base_url=f"http://{host}", follow_redirects=False)


def test_only_who_has_the_token_sees_anything_and_it_leaves_the_address(runs: Path) -> None:
    browser = client(runs, token=TOKEN, host="server.example.org")
    for path in ("/", "/run/one", "/data/one", "/files/page.js", "/?token=wrong", "/?token=%C3%A9"):
        answer = browser.get(path)
        assert answer.status_code == 401, path
        assert "one" not in answer.text.split()
    first = browser.get(f"/run/one?token={TOKEN}")
    assert (first.status_code, first.headers["location"]) == (303, "/run/one")
    cookie = first.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert browser.get("/run/one").status_code == 200  # by its cookie
    stranger = client(runs, token=TOKEN)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert stranger.get("/data/one", headers=bearer).status_code == 200
    assert stranger.get("/data/one", headers={"authorization": "Bearer x"}).status_code == 401
    assert client(runs, token=TOKEN + "2").get("/", headers=bearer).status_code == 401


def test_an_admission_leads_nowhere_else(runs: Path) -> None:
    answer = client(runs, token=TOKEN).get(f"//evil.example/x?token={TOKEN}")
    assert answer.headers.get("location", "/").startswith("/")
    assert not answer.headers.get("location", "/").startswith("//")


def test_without_a_token_only_this_machine_is_asked_under_its_own_name(runs: Path) -> None:
    assert client(runs).get("/").status_code == 200
    assert client(runs).get("/", headers={"host": "[::1]:8600"}).status_code == 200
    assert client(runs, host="rebound.example.org").get("/").status_code == 421


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch", "options"])
def test_nothing_can_be_changed(method: str, runs: Path) -> None:
    assert getattr(client(runs), method)("/run/one").status_code == 405


@pytest.mark.parametrize(
    "name",
    ["%2e%2e%2f", "..%2fone", "%2e%2e", "one%2f..%2ftwo", "%00", ".hidden", "none", "a" * 101],
)
def test_a_name_that_leaves_the_directory_of_runs_is_refused(name: str, runs: Path) -> None:
    write_run(runs / ".hidden", [started("hidden")])
    inner = runs / "inner"
    inner.mkdir()
    (runs / "one").rename(inner / "one")
    write_run(runs / "one", [started("outside")])
    for path in (f"/run/{name}", f"/data/{name}"):
        assert client(inner).get(path).status_code == 404


def test_every_answer_forbids_what_the_page_does_not_need(runs: Path) -> None:
    for path in ("/", "/data/one", "/files/live.js", "/nothing"):
        headers = client(runs).get(path).headers
        assert "default-src 'none'; script-src 'self';" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_the_newest_run_is_shown_first_and_the_others_are_listed(runs: Path) -> None:
    os.utime(runs / "two" / "events.jsonl", (1, 1))
    page = client(runs).get("/").text
    assert "<h1>one</h1>" in page and 'data-live="/data/one"' in page
    assert '<a href="/run/two">two</a>' in page
    assert '<a href="/run/one" aria-current="page">one</a>' in page
    assert "not-a-run" not in page


def test_texts_of_a_run_stay_text_in_page_and_data(runs: Path) -> None:
    hostile = "<img src=x onerror=alert(1)></script>"
    write_run(
        runs / "bad",
        [
            event(0, "run_started", run=hostile, term=1),
            event(1, "round_opened", round=1, clients=[hostile]),
            refusal(2, hostile, 1, f"{hostile} at redis://me:s3cret@host/0"),
        ],
    )
    asked = client(runs)
    page, data = asked.get("/run/bad").text, asked.get("/data/bad")
    assert "<img" not in page and "<img" not in data.json()["body"]
    assert "s3cret" not in page + data.text
    assert data.headers["content-type"] == "application/json"


def test_a_page_that_has_not_changed_is_not_sent_again(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_LEAST_WAIT_S", 0.0)
    monkeypatch.setattr(live, "_SHARE", 1e9)
    asked = client(runs)
    first = asked.get("/data/one")
    tag = {"if-none-match": first.headers["etag"]}
    assert asked.get("/data/one", headers=tag).status_code == 304
    grow(runs / "one", committed(20, 2, 4711, a=[]))
    second = asked.get("/data/one", headers=tag)
    assert second.status_code == 200
    assert "4,711" in second.json()["body"] and "4,711" not in first.json()["body"]
    (runs / "one" / "server-alive").touch()  # nothing happened, but a server leads it
    assert "running" in asked.get("/data/one").json()["body"]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_event_is_read_once_however_often_people_look(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = StoryReader.read

    def counted(self: StoryReader, record: dict[str, Any]) -> None:
        read.append(record["event"])
        original(self, record)

    monkeypatch.setattr(StoryReader, "read", counted)
    clock = Clock()
    run = LiveRun(runs / "one", clock=clock)
    first = run.view(Markup(""))
    assert len(read) == 3
    grow(runs / "one", event(20, "x"))
    assert run.view(Markup("")) is first  # within the second
    clock.now_s += 1.5
    assert run.view(Markup("")).version != first.version
    assert read[3:] == ["x"]


def test_a_long_run_is_read_in_parts(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MOST_BYTES", 2000)
    monkeypatch.setattr(live, "_TORN_BYTES", 0)
    grow(runs / "one", *(committed(20 + i, i, i * 10, a=[]) for i in range(2, 40)))
    assert 'data-version=""' in client(runs).get("/run/one").text
    run = LiveRun(runs / "one")
    views = [run.view(Markup("")) for _ in range(6)]
    behind = [view.behind for view in views if view.shown is None]
    assert len(behind) >= 2 and behind == sorted(behind, reverse=True)
    assert views[-1].shown is not None and "39" in views[-1].shown.body


def test_another_run_of_the_same_name_begins_a_page_of_its_own(runs: Path) -> None:
    clock = Clock()
    run = LiveRun(runs / "one", clock=clock)
    run.view(Markup(""))
    (runs / "one" / "events.jsonl").write_text(json.dumps(started("other")) + "\n")
    clock.now_s += 1000
    shown = run.view(Markup("")).shown
    assert shown is not None and shown.title == "other"


def test_a_broken_file_is_a_sentence_at_each_look(runs: Path) -> None:
    grow(runs / "one", event(20, "round_committed"), event(21, "x"))
    run = LiveRun(runs / "one")
    for _ in range(2):
        with pytest.raises(NoStory, match="an event that no version of pilot writes"):
            run.view(Markup(""))
    assert client(runs).get("/data/one").status_code == 404


def test_mistakes_are_one_sentence_before_anything_is_served(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(runs))
    run = str(runs / "one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, sentence in (
            (["nobody"], "there is no run in"),
            ([run, "--port", port], f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            ([run, "--port", "99999"], "--port 99999 is no port"),
            ([run, "--host", "no host"], "cannot listen on no host"),
            ([run, "--key", "x"], "belong together"),
            ([run, "--key", "x", "--certificate", "y"], "y is not there"),
        ):
            assert cli.main(["dashboard", *arguments]) == 2
            said = capsys.readouterr().err
            assert sentence in said and said.count("\n") == 1, said


def test_a_token_is_never_printed_into_a_file_of_output(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pilot.page import script

    monkeypatch.setattr(script, "vega_script", lambda: "")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(runs))
    served: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: served.append(self.config))
    command = ["dashboard", str(runs / "one"), "--host", "0.0.0.0", "--port", "0"]
    assert cli.main(command) == 2
    assert "set PILOT_DASHBOARD_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("PILOT_DASHBOARD_TOKEN", "short")
    assert cli.main(command) == 2
    assert "fewer than 16" in capsys.readouterr().err
    monkeypatch.setenv("PILOT_DASHBOARD_TOKEN", TOKEN)
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "reads the token" in said.err
    (config,) = served
    assert config.access_log is False
