"""A short tour: two sites of real processes, a fault every few seconds, and the books afterwards."""

import json
from pathlib import Path

import pytest

from benchmarks.chaos import faults, tour

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

# of each sort one: a site's process, what connects them, a bad reply, the keeper of the books
KINDS = ["kill-worker", "kill-redis", "reply-nan", "kill-serverapp"]


def test_a_run_that_faults_strike_reaches_its_tokens_and_its_books_are_right(
    builtin: Path, tmp_path: Path
) -> None:
    sites = ("site-a", "site-b")
    plan = faults.plan(3, duration_s=6.0 * len(KINDS), every_s=6.0, sites=sites, kinds=KINDS)
    spec = tour.Tour(
        name="chaos-tour",
        sites=sites,
        total_tokens=2 * 24576,
        round_tokens=24576,
        plan=tuple(plan),
        timeout_s=240.0,
    )
    outcome = tour.run(spec, tmp_path / "chaos", builtin)
    figures = tour.figures(outcome, None, sites=sites)
    assert figures["violations"] == [], f"{json.dumps(figures)}\n{tour.journal(outcome)}"
    assert outcome.finished
    assert outcome.bpb is not None
    assert figures["faults"] >= len(KINDS) - 2  # a fast machine may be done before the last ones
