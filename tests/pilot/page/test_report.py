"""`pilot report`: what it writes, and how it says what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pilot import cli
from pilot.commands import report
from pilot.page.script import NoScript, vega_script

from .story_kit import BOOKS, SHORT, SPOT, committed, event, write_run


@pytest.fixture(autouse=True)
def short_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one takes seconds; `test_browser.py` has it."""
    monkeypatch.setattr(report, "vega_script", lambda: "var vegaEmbed;")


def test_a_run_is_named_or_given_by_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "mine", [event(0, "run_started", run="mine", term=1)])
    assert cli.main(["report", "mine"]) == 0
    assert capsys.readouterr().out.startswith("mine.html (")
    assert cli.main(["report", str(SPOT), "-o", "there.html"]) == 0
    assert "<h1>mine</h1>" in (tmp_path / "mine.html").read_text()
    assert "<h1>disturbed-6b0a72d1-12770</h1>" in (tmp_path / "there.html").read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is not the directory of a run: it has no events.jsonl"),
        ("", "holds no events yet"),
        ("not json\n[1]\n{}\n", "holds no events yet"),
        ('{"time": 1, "event": "round_committed"}\n', "an event that no version of pilot writes"),
    ],
)
def test_a_directory_without_a_run_is_one_sentence_and_leaves_no_file(
    content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "events.jsonl").write_text(content)
    output = tmp_path / "page.html"
    assert cli.main(["report", str(run), "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not output.exists()


def test_an_unknown_run_and_an_output_that_cannot_be_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert cli.main(["report", "nobody"]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert cli.main(["report", str(SPOT), "-o", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert cli.main(["report", str(SPOT), "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_without_the_plotting_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    vega_script.cache_clear()
    with pytest.raises(NoScript, match=r"pilot\[report\]"):
        vega_script()


def test_no_text_of_a_run_becomes_markup_and_no_password_is_written(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    url = "rediss://pilot:s3cret@10.0.0.1:6380/0"
    run = write_run(
        tmp_path / "run",
        [
            event(0, "run_started", run=hostile, term=1),
            event(1, "round_opened", round=1, clients=[hostile]),
            event(2, "reply_refused", round=1, client=hostile, reason=f"{hostile} at {url}"),
            committed(3, 1, 10, **{hostile: [[0, 0, 0, 8]]}),
            event(4, "idle", cause=hostile, seconds=1.5),
            committed(5, 2, 20),
        ],
    )
    snapshot = run / "snapshots" / "round-000001"
    snapshot.mkdir(parents=True)
    state = {"config": {"redis-url": url, "tokenizer": hostile}, "total_tokens": 1}
    (snapshot / "state.json").write_text(json.dumps(state))
    output = tmp_path / "page.html"
    assert cli.main(["report", str(run), "-o", str(output)]) == 0
    html = output.read_text()
    assert "s3cret" not in html
    assert "***@10.0.0.1:6380" in html
    assert "<img" not in html
    assert html.count("<script") == 3  # the figures, the library and the page's own
    figures = re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)
    assert figures is not None
    specs = json.loads(figures[1])
    assert specs["run0-lanes"]["layer"][2]["data"]["values"][0]["client"] == hostile


def test_runs_of_one_name_are_shown_as_two(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    assert cli.main(["report", str(SHORT), str(SHORT), "-o", str(output)]) == 0
    html = output.read_text()
    assert html.count("<article") == 2
    assert "disturbed-6b0aa6d1-20927 (2)" in html


def test_the_command_imports_neither_torch_nor_the_plotting_package_before_it_must() -> None:
    code = "import sys, pilot.cli; print([m for m in ('torch', 'vl_convert') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_figures_are_there_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(BOOKS), str(SHORT), "--json"]) == 0
    books, short = json.loads(capsys.readouterr().out)
    assert (books["run"], books["state"]) == ("disturbed-6b0af6ac-15281", "finished")
    assert (books["rounds"], len(books["points"]), books["energy"]) == (23, 24, {})
    assert books["tokens"] == books["points"][-1]["tokens"] == 1_106_240
    assert sum(books["refused"].values()) == 7
    assert books["clients"][0]["seconds_by_state"]["training"] > 0
    assert (short["goodput"], short["bytes_up"]) == (None, None)
    output = tmp_path / "figures.json"
    assert cli.main(["report", str(BOOKS), "--json", "-o", str(output)]) == 0
    assert json.loads(output.read_text()) == [books]


def test_energy_is_drawn_where_events_have_it(tmp_path: Path) -> None:
    used = event(6, "energy", client="a", kwh=1.5, grams=600.0)
    run = write_run(tmp_path / "run", [event(0, "x"), committed(5, 1, 3_000_000), used])
    output = tmp_path / "page.html"
    assert cli.main(["report", str(run), "-o", str(output)]) == 0
    html = output.read_text()
    assert "1.5 kWh, 600 g of CO2 in all" in html and "0.5 kWh per million tokens" in html
    assert 'id="run0-energy"' in html
