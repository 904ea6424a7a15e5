"""The points of a comparison, rehearsed side by side: each a policy with settings, in its own directory."""

import itertools
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.files import atomic_write_json
from pilot.config import RunConfig, Scalar
from pilot.errors import ConfigError
from pilot.overrides import load_run_config
from pilot.rehearse.machine import Physics
from pilot.rehearse.outcome import Outcome, outcome
from pilot.rehearse.run import rehearse
from pilot.rehearse.scenario import Scenario
from pilot.run.events import EVENTS_FILE
from pilot.run.sizes import sizes

OUTCOME_FILE = "outcome.json"
_MEMORY = Path("/dev/shm")
# What a rehearsal has where a run has nothing to say about it
_REHEARSED: Mapping[str, Scalar] = {"run-name": "rehearsal", "wandb-mode": "disabled"}


@dataclass(frozen=True)
class Point:
    """One rehearsal; `settings` override the scenario's run configuration."""

    scenario: Scenario
    policy: str
    settings: dict[str, Scalar]
    common: dict[str, Scalar]  # settings of all points
    directory: Path
    seed: int = 0
    until_s: float = 0.0  # 0: the scenario's hours
    until_event: int = 0

    @property
    def config(self) -> RunConfig:
        """Raises ConfigError."""
        own = self.scenario.run_config
        return RunConfig.from_mapping({**_REHEARSED, **own, **self.common, **self.settings})


def grid(sweep: str) -> list[dict[str, Scalar]]:
    """`"a=1,2 b=3,4"` → all combinations; "" → one without settings. Raises ConfigError."""
    keys, values = [], []
    for word in sweep.split():
        key, equals, given = word.partition("=")
        options = [option for option in given.split(",") if option]
        if not equals or not key or not options:
            raise ConfigError(f'--sweep "{word}" is not KEY=VALUE,VALUE')
        keys.append(key)
        values.append([_value(key, option) for option in options])
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def _value(key: str, text: str) -> Scalar:
    try:
        return load_run_config([f"{key}={text}"])[key]
    except ConfigError:
        return load_run_config([f'{key}="{text}"'])[key]  # a word needs no quotes here


def rehearse_point(point: Point) -> Outcome:
    """Rehearse it and leave its events in its directory, in place of what was there."""
    torch.set_num_threads(1)  # tensors of a few numbers: threads would only wait for one another
    config, scenario = point.config, point.scenario
    size = sizes(config, rows=1)
    physics = Physics(config, size.order, size.reply, scenario.shard_rows)
    sites, trace = scenario.under(scenario.policies[point.policy])
    point.directory.mkdir(parents=True, exist_ok=True)
    # in memory where there is such a place: nobody resumes a rehearsal, and a disk takes its time
    scratch = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=_MEMORY if _MEMORY.is_dir() else None))
    try:
        done = rehearse(
            config,
            [site.machine for site in sites],
            trace,
            scratch,
            physics=physics,
            seed=point.seed,
            until_s=point.until_s or 3600 * scenario.hours,
            until_event=point.until_event,
            restart_s=scenario.restart_s,
        )
        found = outcome(
            done,
            sites,
            scratch,
            policy=point.policy,
            settings=point.settings,
            seed=point.seed,
        )
        shutil.copyfile(scratch / EVENTS_FILE, point.directory / EVENTS_FILE)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = Outcome(**(vars(found) | {"directory": str(point.directory)}))
    atomic_write_json(point.directory / OUTCOME_FILE, found.to_json())
    return found


def rehearse_all(points: Sequence[Point], *, jobs: int) -> Iterator[Outcome]:
    """Their outcomes in order, `jobs` points at a time."""
    if jobs <= 1 or len(points) == 1:
        yield from map(rehearse_point, points)
        return
    context = multiprocessing.get_context("spawn")  # torch has threads, which a fork loses
    with ProcessPoolExecutor(min(jobs, len(points)), mp_context=context) as pool:
        yield from pool.map(rehearse_point, points)
