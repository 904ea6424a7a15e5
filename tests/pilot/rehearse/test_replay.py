"""A run's events as a scenario: rehearsed again, it comes to about what the run came to."""

import json
import shutil
from pathlib import Path

import pytest

from pilot.config import RunConfig
from pilot.rehearse.machine import Machine, Physics
from pilot.rehearse.points import Point, rehearse_point
from pilot.rehearse.replay import of_run
from pilot.rehearse.run import Rehearsal, rehearse
from pilot.rehearse.scenario import ScenarioError
from pilot.rehearse.trace import Happening
from pilot.run.events import EVENTS_FILE
from pilot.run.sizes import sizes

CONFIG = RunConfig.from_mapping(
    {
        "run-name": "r",
        "depth": 1,
        "vocab-size": 300,
        "sequence-len": 8,
        "total-batch-size": 64,
        "device-batch-size": 1,
        "num-shards": 100,
        "total-tokens": 200_000,
        "round-min-duration": 60.0,
        "round-max-duration": 60.0,
        "min-clients": 1,
        "quorum": 1,
        "heartbeat": 1.0,
        "eval-rows": 12,
        "wandb-mode": "disabled",
    }
)
TRACE = [
    *(Happening(5.0, name, "up") for name in ("a", "b", "c")),
    Happening(500.0, "a", "crash"),
    Happening(700.0, "b", "down"),
    Happening(900.0, "b", "up"),
    Happening(1230.0, "c", "lie"),
    Happening(1500.0, "server", "kill", 30.0),
    Happening(1900.0, "a", "freeze", 200.0),
    Happening(2300.0, "c", "speed", 10.0),
]


def run(directory: Path) -> Rehearsal:
    machines = [
        Machine(name=name, tokens_per_s=speed, boot_s=3.0, start_s=1.5, upload_bytes_s=1e6)
        for name, speed in (("a", 40.0), ("b", 30.0), ("c", 20.0))
    ]
    size = sizes(CONFIG, rows=1)
    physics = Physics(CONFIG, size.order, size.reply, shard_rows=400)
    return rehearse(CONFIG, machines, TRACE, directory, physics=physics, seed=0, until_s=1e5)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rehearsal]:
    directory = tmp_path_factory.mktemp("run")
    return directory, run(directory)


def test_a_run_rehearsed_from_its_events_comes_to_the_same(
    ran: tuple[Path, Rehearsal], tmp_path: Path
) -> None:
    directory, before = ran
    scenario = of_run(directory)
    assert scenario.shard_rows == 400
    point = Point(scenario, "", {}, {}, tmp_path / "again", until_s=1e5)
    after = rehearse_point(point)
    assert (after.terms, before.terms) == (2, 2)
    assert 3600 * after.hours == pytest.approx(before.seconds, rel=0.03)
    assert after.rounds == pytest.approx(before.state.round_number, rel=0.05)
    assert after.wasted_tokens == pytest.approx(before.wasted_tokens, rel=0.25)
    # and another configuration makes another run of the same night
    other = rehearse_point(
        Point(
            scenario,
            "",
            {"round-max-duration": 300.0, "round-min-duration": 300.0},
            {},
            tmp_path / "other",
            until_s=1e5,
        )
    )
    assert other.rounds < after.rounds / 3 and other.wasted_tokens > after.wasted_tokens


def test_what_is_no_run_is_refused_with_a_sentence(
    ran: tuple[Path, Rehearsal], tmp_path: Path
) -> None:
    with pytest.raises(ScenarioError, match=r"needs events\.jsonl and a snapshot"):
        of_run(tmp_path)
    run_dir = tmp_path / "run"
    shutil.copytree(ran[0], run_dir)
    lines = (run_dir / EVENTS_FILE).read_text().splitlines()
    broken = {"time": 1.7e9, "event": "round_opened", "clients": 7}
    (run_dir / EVENTS_FILE).write_text("\n".join([json.dumps(broken), *lines]))
    with pytest.raises(ScenarioError, match="holds an event that no version of pilot writes"):
        of_run(run_dir)
