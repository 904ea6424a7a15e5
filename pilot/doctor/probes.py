"""Looks at the machine and its surroundings. Each probe ends by itself within seconds, and raises nothing."""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import redis
from packaging.requirements import Requirement

from pilot.config import RunConfig
from pilot.coordination.link import CoordinatorError, connect, ping
from pilot.doctor.facts import (
    ClockFacts,
    DataFacts,
    FlowerFacts,
    PortFacts,
    RedisFacts,
    SizeFacts,
    SpaceFacts,
    TorchFacts,
)
from pilot.errors import PilotError
from pilot.launch import connection as connections
from pilot.redis_url import has_credentials, redact_url

NETWORK_S = 3.0
# Torch imports for two seconds on a quiet machine, and for many on a busy one
CHILD_S = 30.0
_LOOPBACK = ("localhost", "127.", "::1")
# What `pilot up` takes: the SuperLink, a SuperNode's own, Redis
PORTS = ((8000, "SuperLink"), (6379, "Redis"))


def ask_child(question: str, *arguments: str) -> dict[str, Any]:
    """What `doctor/child.py` answers, in a process of its own: a broken driver ends that one only."""
    command = [sys.executable, "-m", "pilot.doctor.child", question, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"it did not answer within {CHILD_S:.0f} s"}
    except OSError as error:
        return {"error": str(error)}
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        return found if isinstance(found, dict) else {"error": "it answered nonsense"}
    except (ValueError, IndexError):
        lines = done.stderr.strip().splitlines()
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return {"error": f"it ended with {how}" + (f" ({lines[-1][:300]})" if lines else "")}


def probe_torch() -> TorchFacts:
    found = ask_child("torch")
    if "error" in found:
        return TorchFacts(error=f"cannot be used: {found['error']}")
    found["devices"] = tuple(found["devices"])
    return TorchFacts(gpus_here=connections.count_gpus(), **found)


def probe_data(config: RunConfig) -> DataFacts:
    found = ask_child("data", json.dumps(config.to_mapping()))
    return DataFacts(**found)


def probe_sizes(config: RunConfig, gpus: int) -> SizeFacts:
    found = ask_child("sizes", json.dumps(config.to_mapping()), str(max(1, gpus)))
    if "error" in found:
        return SizeFacts(error=found["error"])
    return SizeFacts(values=found)


def probe_redis(url: str) -> RedisFacts:
    """As far as this user may look: what a site's login is refused is None."""
    shown = redact_url(url)
    try:
        ping(url)
    except CoordinatorError as error:
        return RedisFacts(shown, error=str(error))
    parts = urlsplit(url)
    host = parts.hostname or ""
    with connect(url) as link:
        server, memory = _asked(link, "server"), _asked(link, "memory")
        persistence = _asked(link, "persistence")
        save = _saves(link)
        return RedisFacts(
            shown,
            version=str(server.get("valkey_version") or server.get("redis_version") or ""),
            password=has_credentials(url),
            loopback=parts.scheme == "unix" or host.startswith(_LOOPBACK) or not host,
            tls=parts.scheme == "rediss",
            maxmemory=memory.get("maxmemory"),
            policy=memory.get("maxmemory_policy"),
            saves=save,
            last_save_ok=persistence.get("rdb_last_bgsave_status", "ok") == "ok",
            writes=_writes(link),
        )


def _asked(link: "redis.Redis", section: str) -> dict[str, Any]:
    try:
        found = link.info(section)
    except (redis.RedisError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _saves(link: "redis.Redis") -> bool | None:
    try:
        found: Any = link.config_get("save")
    except (redis.RedisError, OSError):
        return None
    return bool(found.get("save"))


def _writes(link: "redis.Redis") -> str:
    """Why a key of our own cannot be written; "" if it can, or if this login may not, as that of a site."""
    key = f"pilot:doctor:{os.getpid()}"
    try:
        link.set(key, "x", px=1000)
    except redis.exceptions.NoPermissionError:
        return ""
    except (redis.RedisError, OSError) as error:
        return str(error)
    return ""


def probe_clock(redis_url: str, superlink: str = "", ca: str = "") -> ClockFacts:
    """By Redis's time if that answers, else by the date in the reply of the URL `superlink` (to a second)."""
    why = "no Redis is known here"
    if redis_url:
        try:
            with connect(redis_url) as link:
                began_s = time.time()
                found: Any = link.time()
                ended_s = time.time()
            theirs_s = found[0] + found[1] / 1e6
            half_s = (ended_s - began_s) / 2
            return ClockFacts(began_s + half_s - theirs_s, half_s, "that of Redis")
        except (redis.RedisError, OSError) as error:
            why = f"Redis does not tell its time ({error})"
    return _superlink_clock(superlink, ca, why) if superlink else ClockFacts(why=why)


def _superlink_clock(url: str, ca: str, why: str) -> ClockFacts:
    try:
        trusted = ssl.create_default_context(cafile=ca or None) if url.startswith("https") else None
        began_s = time.time()
        try:
            with urllib.request.urlopen(url, timeout=NETWORK_S, context=trusted) as reply:
                date = reply.headers.get("Date")
        except urllib.error.HTTPError as error:  # any answer has its date
            date = error.headers.get("Date")
        theirs_s = parsedate_to_datetime(str(date)).timestamp() + 0.5
        return ClockFacts((began_s + time.time()) / 2 - theirs_s, 1.0, f"that of {url}")
    except (OSError, ValueError, TypeError) as error:
        return ClockFacts(why=f"{why}, and the SuperLink at {url} does not tell its date ({error})")


def probe_flower(name: str | None, app: Path) -> FlowerFacts:
    """The installed version, and the connection `name` (None: the default one)."""
    wanted, installed = _requirement("flwr"), ""
    with contextlib.suppress(PackageNotFoundError):
        installed = version("flwr")
    facts: dict[str, Any] = {
        "version": installed,
        "wanted": str(wanted.specifier) if wanted else "",
        "fits": bool(installed) and (wanted is None or wanted.specifier.contains(installed)),
    }
    try:
        found = connections.read_connection(name, connections.find_flwr_home(app))
        if not found.is_local:
            connections.check_reachable(found)
    except PilotError as error:
        return FlowerFacts(**facts, refused=str(error))
    return FlowerFacts(**facts, connection=found.name, address=found.address, local=found.is_local)


def _requirement(name: str) -> Requirement | None:
    try:
        found = [Requirement(text) for text in requires("pilot") or []]
    except PackageNotFoundError:
        return None
    return next((one for one in found if one.name == name and one.marker is None), None)


def probe_ports(ports: Iterable[tuple[int, str]] = PORTS) -> list[PortFacts]:
    return [PortFacts(port, what, _is_free(port)) for port, what in ports]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def probe_space(base: Path) -> SpaceFacts:
    """Of the nearest directory that exists; memory as a control group limits it."""
    there = next((path for path in (base, *base.parents) if path.is_dir()), Path("/"))
    shm = Path("/dev/shm")
    return SpaceFacts(
        str(base),
        shutil.disk_usage(there).free,
        min(psutil.virtual_memory().total, _group_limit()),
        shutil.disk_usage(shm).total if shm.is_dir() else None,
    )


def _group_limit() -> int:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return sys.maxsize


def probe_writable(directories: Iterable[Path]) -> Mapping[str, str]:
    """Directory → why nothing can be written there ("": it can). One that is missing is made."""
    return {str(directory): _refused(directory) for directory in directories}


def _refused(directory: Path) -> str:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)
