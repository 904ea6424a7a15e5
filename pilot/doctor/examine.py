"""All checks in the order in which one reads them, and the few that a start can afford."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pilot.config import RunConfig
from pilot.coordination.operator import Operator
from pilot.doctor import checks, probes
from pilot.doctor.finding import Finding, fix, unknown
from pilot.errors import PilotError
from pilot.launch.connection import base_directory
from pilot.run.facts import read_facts
from pilot.status.published import published
from pilot.status.sources import NoRedis, redis_url, run_directories

ROLES = ("server", "site")


def quick_checks(
    *, url: str | None = None, base: Path | None = None, superlink: str = "", ca: str = ""
) -> list[Finding]:
    """What `pilot up` and `pilot join` look at before they start: no import of torch, a few seconds at most.

    `url`: the Redis that will be used (None: the one that is known here; "": none yet, it will be started).
    `base`: `$NANOCHAT_BASE_DIR`. `superlink`: a URL whose date is compared where no Redis tells its time,
    trusted by the CA file `ca`.
    """
    base = base or base_directory()
    found = checks.check_python(sys.version_info[:3])
    found += checks.check_writable(probes.probe_writable([base, Path(tempfile.gettempdir())]))
    found += checks.check_space(probes.probe_space(base), None, ())
    if url != "":
        found += _redis_and_clock(url, superlink, ca)
    elif superlink:
        found += checks.check_clock(probes.probe_clock("", superlink, ca))
    return found


def examine(
    config: RunConfig | None, *, app: Path, connection: str | None, roles: Sequence[str] = ROLES
) -> Iterator[Finding]:
    """Everything; findings come as they are known. `config`: of the run that this machine is to take."""
    yield from checks.check_python(sys.version_info[:3])
    torch = probes.probe_torch()
    yield from checks.check_torch(torch)
    flower = probes.probe_flower(connection, app)
    yield from checks.check_flower(flower)
    yield from checks.check_ports(probes.probe_ports())
    yield from _redis_and_clock(None, flower.url, flower.ca)
    base = base_directory()
    places = [base, base / "runs", Path(tempfile.gettempdir())]
    yield from checks.check_writable(probes.probe_writable(places))
    sizes = None if config is None else probes.probe_sizes(config, len(torch.devices))
    yield from checks.check_space(probes.probe_space(base), sizes, roles)
    if config is not None:
        run, heads = fingerprints(config)
        yield from checks.check_data(probes.probe_data(config), heads, run)


def _redis_and_clock(url: str | None, superlink: str = "", ca: str = "") -> list[Finding]:
    try:
        known = redis_url() if url is None else url
    except NoRedis as error:
        found = [unknown("Redis", f"{error}; a simulation brings its own")]
        return found + checks.check_clock(probes.probe_clock("", superlink, ca))
    except PilotError as error:  # a URL that is none
        return [fix("Redis", str(error), "correct it")]
    found = checks.check_redis(probes.probe_redis(known))
    return found + checks.check_clock(probes.probe_clock(known, superlink, ca))


def fingerprints(config: RunConfig) -> tuple[str, Mapping[str, str]]:
    """(run, what its clients agree on): of the run of that name, else of one that is led now.

    First by Redis, where its server says it; then by the newest snapshot on this machine. ("", {}) if neither
    knows one.
    """
    for read in (_published, _on_disk):
        found = read(config.run_name)
        if found[1]:
            return found
    return "", {}


def _published(name: str) -> tuple[str, Mapping[str, str]]:
    try:
        with Operator(redis_url()) as operator:
            for run in [name] if name else operator.runs():
                live = operator.look(run)
                said = published(live).get("fingerprints", {})
                if live.leader and said:
                    return run, {str(what): str(ours) for what, ours in said.items()}
    except PilotError:
        pass
    return "", {}


def _on_disk(name: str) -> tuple[str, Mapping[str, str]]:
    for directory in run_directories():
        facts = read_facts(directory)
        if facts.fingerprints and (directory.name == name or (not name and facts.alive)):
            return directory.name, facts.fingerprints
    return "", {}
