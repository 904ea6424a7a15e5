"""The page in a real browser: it draws, its charts hold the run's numbers, and it is readable at any width.

One Chromium, Debian's, serves all of these tests.
"""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from pilot import cli
from pilot.page.dashboard import dashboard
from pilot.page.live import Runs
from pilot.page.script import vega_script
from pilot.page.timeline import timeline
from pilot.run.events import read_events

from .story_kit import SHORT, SPOT, committed, event, refusal, reply, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "<img src=x onerror=document.title='owned'>'\"</script>"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium, and only root with apt can install it"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # without its sandbox, which root cannot have: it sees the test's own pages only
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def write_page(directory: Path, *runs: Path) -> Path:
    output = directory / "page.html"
    assert cli.main(["report", *map(str, runs), "-o", str(output)]) == 0
    return output


def drawn(browser: Browser, path: Path, **options: Any) -> tuple[Page, list[str]]:
    """The page when all its charts are there, and what the browser had to complain about so far."""
    page = browser.new_page(**options)
    page.set_default_timeout(600_000)  # a busy machine
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(f"fetches {request.url[:80]}"))
    page.goto(f"file://{path}")
    page.wait_for_function("document.documentElement.dataset.drawn")
    asked = [f"fetches file://{path}"[: 8 + 80], "fetches data:,"]
    return page, [line for line in said if line not in asked]


@pytest.fixture(scope="module")
def spot(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Page, list[str]]]:
    path = write_page(tmp_path_factory.mktemp("page"), SPOT)
    page, said = drawn(browser, path, viewport={"width": 1600, "height": 900})
    yield page, said
    page.close()


def settled(page: Page) -> None:
    """After a change of the window's size: what the charts do in its wake."""
    page.wait_for_timeout(500)  # the browser tells the page of its size when it next draws
    page.evaluate(
        "Promise.all(Object.values(pilotReport.views).map((view) => view.runAsync()))"
        ".then(() => null)"
    )


def marks(page: Page, figure: str, role: str) -> int:
    return page.locator(f"#{figure} svg [aria-roledescription='{role}']").count()


def test_a_page_draws_without_a_word_and_without_a_network(spot: tuple[Page, list[str]]) -> None:
    page, said = spot
    assert page.evaluate("[document.documentElement.dataset.drawn, pilotReport.errors]") == [
        "yes",
        [],
    ]
    assert said == []
    charts = page.locator(".chart").count()
    assert charts == page.locator(".chart svg").count() == 11


def test_the_lanes_hold_each_interval_and_each_refusal_of_the_run(
    spot: tuple[Page, list[str]],
) -> None:
    page, _ = spot
    lanes = timeline(read_events(SPOT / "events.jsonl"))
    assert marks(page, "run0-lanes", "bar") == len(lanes.intervals)
    assert marks(page, "run0-lanes", "point") == len(lanes.refusals) + len(lanes.clients)
    shown = page.locator("#run0-lanes svg [aria-roledescription='bar']").evaluate_all(
        "bars => [...new Set(bars.map(bar => getComputedStyle(bar).fill))].length"
    )
    assert shown == len(
        {one.state for one in lanes.intervals}
    )  # a colour a state, and all are drawn
    words = page.locator("#run0-lanes svg").text_content() or ""
    assert all(client in words for client in lanes.clients)


def test_the_curves_hold_the_numbers_of_the_server(spot: tuple[Page, list[str]]) -> None:
    page, _ = spot
    events = list(read_events(SPOT / "events.jsonl"))
    committed = [one for one in events if one["event"] == "round_committed"]
    labels = page.locator("#run0-train-loss-tokens svg").text_content() or ""
    assert f"{committed[-1]['train_loss']:.4g}" in labels
    scores = {one["round"]: one["val_bpb"] for one in events if one["event"] == "validation"}
    assert f"{scores[27]:.4g}" in (page.locator("#run0-bpb-time svg").text_content() or "")
    assert marks(page, "run0-bpb-tokens", "point") == len(scores)
    tiles = page.locator(".tiles").inner_text()
    assert f"{committed[-1]['total_tokens']:,}" in tiles
    assert f"{scores[27]:.4f}" in tiles


@pytest.mark.parametrize("width", [1600, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_readable_at_any_width_in_light_and_dark(
    spot: tuple[Page, list[str]], width: int, scheme: Any
) -> None:
    page, _ = spot
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "[...document.querySelectorAll('.chart svg')]"
        ".filter(svg => svg.getBoundingClientRect().right > innerWidth)"
        ".map(svg => svg.closest('.chart').id)"
    )
    assert wide == []
    ink, ground, label = page.evaluate(
        """() => [document.body, document.body, document.querySelector("#run0-lanes svg text")].map(
          (node, i) => getComputedStyle(node)[["color", "backgroundColor", "fill"][i]])"""
    )
    assert (luminance(ink) < luminance(ground)) == (scheme == "light")
    assert contrast(ink, ground) >= 7  # WCAG's levels AAA and AA
    assert contrast(label, ground) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of an "rgb(r, g, b)", as WCAG 2 defines it."""
    channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_keyboard_reaches_each_chart_and_moves_the_lanes_in_time(
    spot: tuple[Page, list[str]],
) -> None:
    page, _ = spot
    page.set_viewport_size({"width": 1600, "height": 900})
    settled(page)
    reached = page.evaluate(
        """() => [...document.querySelectorAll(".chart")].filter((chart) => {
          chart.focus();
          return document.activeElement === chart && chart.getAttribute("aria-label");
        }).length"""
    )
    assert reached == page.locator(".chart").count()
    domain = "Array.from(pilotReport.views['run0-lanes'].scale('x').domain())"
    whole = page.evaluate(domain)
    lanes = page.locator("#run0-lanes")
    lanes.focus()
    for key, moved in (
        ("+", lambda d: whole[0] < d[0] and d[1] < whole[1]),
        ("ArrowRight", lambda d: d[0] > whole[0] + 0.3 * (whole[1] - whole[0])),
        ("Escape", lambda d: d == whole),
    ):
        page.keyboard.press(key)
        settled(page)
        assert moved(page.evaluate(domain)), key


def test_several_runs_stand_side_by_side_in_their_own_colours(
    browser: Browser, tmp_path: Path
) -> None:
    page, said = drawn(
        browser, write_page(tmp_path, SPOT, SHORT), viewport={"width": 400, "height": 800}
    )
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    words = page.locator("#all-bpb-tokens svg").text_content() or ""
    assert "distur…-12770" in words
    strokes = page.locator(
        "#all-bpb-tokens svg [aria-roledescription='line mark'] , #all-bpb-tokens svg path[stroke]"
    )
    colours = strokes.evaluate_all("lines => lines.map(line => getComputedStyle(line).stroke)")
    assert len(set(colours) - {"none"}) >= 2
    page.close()


def test_hostile_names_are_text_and_run_nothing(browser: Browser, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        [
            event(0, "run_started", run=HOSTILE, term=1),
            event(1, "round_opened", round=1, clients=[HOSTILE]),
            event(8, "round_ended", round=1, reason="target-tokens"),
            reply(9, HOSTILE, 1),
            committed(10, 1, 10, **{HOSTILE: [[0, 0, 0, 8]]}),
            event(10, "idle", cause=HOSTILE, seconds=1.0),
            event(11, "round_opened", round=2, clients=[HOSTILE]),
            refusal(12, HOSTILE, 2, HOSTILE),
        ],
    )
    page, said = drawn(browser, write_page(tmp_path, run))
    assert said == []
    page.locator("#run0-lanes svg [aria-roledescription='bar']").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "<img" in page.locator("#vg-tooltip-element").inner_text()
    assert page.title() == f"{HOSTILE} · Pilot report"
    assert page.locator("img").count() == 0
    page.close()


def test_the_script_is_whole_and_the_page_small(tmp_path: Path) -> None:
    size = write_page(tmp_path, SPOT).stat().st_size
    assert len(vega_script()) < size < 1_500_000


class Served:
    """`pilot dashboard`'s application on a free port, in a thread, over the runs of a directory."""

    def __init__(self, directory: Path) -> None:
        app = dashboard(Runs(directory), vega_script(), token=None)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))

    def __enter__(self) -> "Served":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def __exit__(self, *_: object) -> None:
        self.stop()


def test_a_live_page_follows_the_run_and_leaves_what_people_have_opened(
    browser: Browser, tmp_path: Path
) -> None:
    lines = (SPOT / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(lines) // 2
    events = tmp_path / "runs" / "spot" / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text("".join(lines[:half]), encoding="utf-8")
    write_run(tmp_path / "runs" / "other", [event(0, "run_started", run="other", term=1)])
    os.utime(tmp_path / "runs" / "other" / "events.jsonl", (1, 1))
    with Served(tmp_path / "runs") as served:
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(300_000)  # a busy machine
        said: list[str] = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(served.address)
        page.get_by_text("Live: this page follows the run.").wait_for()
        shown = timeline(read_events(events))
        assert marks(page, "run0-lanes", "bar") == len(shown.intervals)
        assert page.get_by_role("navigation", name="Runs").get_by_role("link").count() == 2
        page.locator("#run0-lanes + details summary").click()
        page.locator("#run0-lanes").focus()
        page.keyboard.press("+")
        settled(page)

        hostile = [
            event(0, "round_opened", round=99, clients=[HOSTILE]),
            refusal(0, HOSTILE, 99, HOSTILE),
        ]
        more = lines[half:] + [json.dumps(one) + "\n" for one in hostile]
        with events.open("a", encoding="utf-8") as file:
            file.writelines(more)
        page.wait_for_selector("html[data-updates]", state="attached")
        whole = timeline(read_events(events))
        assert len(whole.intervals) > len(shown.intervals)
        assert marks(page, "run0-lanes", "bar") == len(whole.intervals)
        committed = [json.loads(line) for line in lines if '"round_committed"' in line]
        assert f"{committed[-1]['total_tokens']:,}" in page.locator(".tiles").inner_text()
        assert page.locator("#run0-lanes + details").get_attribute("open") is not None
        assert page.evaluate("document.activeElement.id") == "run0-lanes"
        low, _ = page.evaluate("Array.from(pilotReport.views['run0-lanes'].scale('x').domain())")
        assert low > 0  # still the part that was chosen
        page.keyboard.press("Escape")
        settled(page)
        assert page.evaluate("pilotReport.views['run0-lanes'].scale('x').domain()[0]") == 0

        assert "<img" in page.locator("main").inner_text()
        assert page.title() == "disturbed-6b0a72d1-12770 · Pilot"
        assert page.locator("img").count() == 0
        assert page.evaluate("pilotReport.errors") == []
        charts = page.locator(".chart").count()
        assert (
            charts
            == page.locator(".chart svg").count()
            == len(page.evaluate("Object.keys(pilotReport.views)"))
        )
        page.set_viewport_size({"width": 400, "height": 900})
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        elsewhere = [line for line in said if not line.startswith((served.address, "data:,"))]
        assert elsewhere == []

        served.stop()
        page.wait_for_selector("#live[data-state='lost']")
        assert "does not answer" in page.locator("#live").inner_text()
        assert page.locator(".chart svg").count() == charts
        page.close()
