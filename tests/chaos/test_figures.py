"""What the chaos benchmark counts."""

from pathlib import Path

from benchmarks.chaos.checker import Books, Merged, Outage
from benchmarks.chaos.micro import TOKENIZER
from benchmarks.chaos.tour import Outcome, participation, prepare
from nanochat.tokenizer import get_tokenizer

SITES = ("site-a", "site-b")


def _merged(*sites: str) -> tuple[Merged, ...]:
    return tuple(
        Merged(site, run="r", term=1, round_number=1, lease_id=n, consumed=())
        for n, site in enumerate(sites)
    )


def _outcome(rounds: list[tuple[str, ...]], outages: list[Outage]) -> Outcome:
    """Rounds of eight seconds from second 0 on, each with those sites' work in its merge."""
    books, events = [], []
    for number, sites in enumerate(rounds, 1):
        books.append(Books(number, 1, 8 * number, _merged(*sites), {}, ()))
        at = 10.0 * number - 10.0
        events += [
            {"event": "round_opened", "round": number, "time": at},
            {"event": "round_ended", "round": number, "time": at + 8.0},
        ]
    return Outcome(True, 0.0, [], None, books, events, outages, [], [])


def test_participation_is_of_those_that_were_up_while_a_round_ran() -> None:
    rounds = [SITES, ("site-a",), ("site-a",), SITES]
    assert participation(_outcome(rounds, []), SITES) == 0.75
    down = Outage("kill-site", "site-b", 15.0, 25.0)  # rounds 2 and 3
    assert participation(_outcome(rounds, [down]), SITES) == 1.0
    between = Outage("kill-site", "site-b", 8.5, 9.5)
    assert participation(_outcome(rounds, [between]), SITES) == 0.75
    no_excuse = Outage("delay-up", "site-b", 15.0, 25.0)
    assert participation(_outcome(rounds, [no_excuse]), SITES) == 0.75
    assert participation(_outcome([], []), SITES) is None


def test_a_base_directory_is_made_ready(tmp_path: Path) -> None:
    prepare(tmp_path / "base")
    assert get_tokenizer(tmp_path / "base" / TOKENIZER).get_vocab_size() == 512
