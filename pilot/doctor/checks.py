"""From what the probes found to what the doctor says: pure functions, each of one subject."""

import re
from collections.abc import Iterable, Mapping, Sequence

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
from pilot.doctor.finding import Finding, fix, ok, unknown

# Flower refuses a node whose signed time is more than 5 s ahead (docs/flower.md)
REFUSED_AHEAD_S, REFUSED_BEHIND_S = 5.0, 305.0
_CLOSE_S = 2.0  # what is still no cause for concern
_DRIVERS = {
    13: 580,
    12: 525,
}  # the oldest driver for a major CUDA version, by NVIDIA's release notes
_LITTLE_DISK = 10 * 10**9  # without knowing the run: an environment and a few shards
_PYTHON = ((3, 11), (3, 13))  # from, below: pyproject's requires-python
# Fingerprints that are compared without packing rows, and how to make them equal
_CURES = {
    "tokenizer": "copy the server's tokenizer directory",
    "corpus": "get the same shards (python -m nanochat.dataset)",
    "validation shard": "get the same shards (python -m nanochat.dataset)",
    "packing": "use the same run configuration and version of nanochat",
    "rustbpe": "build the same rustbpe (uv sync)",
    "pilot package": "check out the same commit",
    "nanochat package": "check out the same commit",
}


def check_python(version: tuple[int, ...]) -> list[Finding]:
    shown, (first, below) = ".".join(map(str, version[:3])), _PYTHON
    if first <= version[:2] < below:
        return [ok("Python", shown)]
    wanted = f"{first[0]}.{first[1]} or newer, below {below[0]}.{below[1]}"
    return [fix("Python", f"{shown}, and Pilot needs {wanted}", "uv sync installs a right one")]


def check_torch(facts: TorchFacts) -> list[Finding]:
    """Torch, the driver, the devices, NCCL."""
    if facts.error:
        return [fix("torch", facts.error, "uv sync, then `python -c 'import torch'` shows more")]
    built = f", built for CUDA {facts.cuda}" if facts.cuda else ", built for CPUs"
    found = [ok("torch", f"{facts.version}{built}"), _devices(facts)]
    if len(facts.devices) > 1:
        several = f"{len(facts.devices)} GPUs"
        found.append(
            ok("NCCL", facts.nccl)
            if facts.nccl
            else fix(
                "NCCL", f"torch has none, and there are {several}", "install a torch with NCCL"
            )
        )
    return found


def _devices(facts: TorchFacts) -> Finding:
    names = ", ".join(dict.fromkeys(facts.devices))
    if facts.devices:
        driver = f", driver {facts.driver}" if facts.driver else ""
        kinds = set(facts.devices)
        if len(kinds) > 1:
            return fix(
                "devices",
                f"cards of different kinds ({names}){driver}",
                "start a node for each kind, with CUDA_VISIBLE_DEVICES",
            )
        return ok("devices", f"{len(facts.devices)} × {names}{driver}")
    if not facts.gpus_here:
        return ok("devices", "MPS" if facts.mps else "no GPU here: training uses the CPUs")
    what = f"{facts.gpus_here} NVIDIA GPUs that torch does not see"
    if not facts.cuda:
        return fix("devices", what, "install a torch that is built for CUDA (docs/deployment.md)")
    needed = _DRIVERS.get(_leading(facts.cuda), 0)
    if facts.driver and _leading(facts.driver) < needed:
        return fix(
            "devices",
            f"{what}: its CUDA {facts.cuda} needs driver {needed} or newer, and here is {facts.driver}",
            "update the driver, or install a torch for an older CUDA (docs/deployment.md)",
        )
    return fix("devices", what, "see what `nvidia-smi` says, and CUDA_VISIBLE_DEVICES")


def check_redis(facts: RedisFacts) -> list[Finding]:
    """Whether it can be used, by whom, and whether it keeps what it is given."""
    if facts.error:
        return [fix("Redis", facts.error, "see docs/deployment.md, Redis")]
    found = [ok("Redis", f"{facts.version} answers at {facts.url}")]
    if facts.writes:
        found.append(fix("Redis writes", facts.writes, "free memory or disk there"))
    if not facts.loopback and not facts.password:
        cure = "set requirepass there, and the password in PILOT_REDIS_URL"
        found.append(fix("Redis password", "anybody on the network can write to it", cure))
    if not facts.loopback and not facts.tls:
        found.append(
            unknown("Redis TLS", "it is spoken to in plain text: right only in a network of yours")
        )
    found += _memory_policy(facts)
    if facts.last_save_ok is False:
        found.append(
            fix(
                "Redis persistence",
                "its last save failed, after which it refuses writes",
                "free its disk, or CONFIG SET save '' (Pilot needs no persistence)",
            )
        )
    elif facts.saves is not None:
        what = "saves to its disk" if facts.saves else "keeps nothing over a restart"
        found.append(ok("Redis persistence", f"{what}; a run loses nothing by that"))
    return found


def _memory_policy(facts: RedisFacts) -> list[Finding]:
    if facts.policy is None or facts.maxmemory is None:
        return [unknown("Redis memory", "this user may not ask for its limit")]
    if not facts.maxmemory:
        return [ok("Redis memory", "no limit")]
    if facts.policy.startswith("allkeys"):
        text = f"{facts.policy} throws away any key, an operator's wishes too, once it is full"
        cure = "CONFIG SET maxmemory-policy noeviction, or give Pilot a Redis of its own"
        return [fix("Redis memory", text, cure)]
    return [ok("Redis memory", f"{facts.maxmemory:,} bytes, {facts.policy}")]


def check_clock(facts: ClockFacts) -> list[Finding]:
    """Against the server's, since Flower compares signed times."""
    if facts.ahead_s is None:
        return [unknown("clock", facts.why or "no server could be asked for its time")]
    side = "ahead of" if facts.ahead_s > 0 else "behind"
    off_s = max(0.0, abs(facts.ahead_s) - facts.good_to_s)
    text = f"{abs(facts.ahead_s):.1f} s {side} {facts.of}"
    limit_s = REFUSED_AHEAD_S if facts.ahead_s > 0 else REFUSED_BEHIND_S
    cure = "let NTP set the clocks of both (timedatectl set-ntp true)"
    if off_s > limit_s:
        return [
            fix("clock", f"{text}: Flower refuses a node that is more than {limit_s:.0f} s", cure)
        ]
    if off_s > _CLOSE_S:
        return [fix("clock", f"{text}: Flower refuses nodes that are 5 s ahead", cure)]
    return [ok("clock", text)]


def check_flower(facts: FlowerFacts) -> list[Finding]:
    """Its version, and the connection that `pilot run` would take."""
    found = [ok("Flower", facts.version)]
    if not facts.fits:
        text = f"{facts.version or 'missing'}, and Pilot needs {facts.wanted}"
        found = [fix("Flower", text, "uv sync")]
    if facts.refused:
        found.append(fix("Flower's connection", facts.refused, "see docs/deployment.md"))
    elif facts.local:
        found.append(ok("Flower's connection", f"{facts.connection} simulates on this machine"))
    elif facts.connection:
        found.append(ok("Flower's connection", f"{facts.connection}: {facts.address} answers"))
    return found


def check_ports(ports: Iterable[PortFacts]) -> list[Finding]:
    """Ports that are taken are no fault: `pilot up` takes others, or something of ours listens there."""
    taken = [f"{one.port} ({one.what})" for one in ports if not one.free]
    if not taken:
        return [ok("ports", "the usual ones are free")]
    return [ok("ports", f"something listens on {', '.join(taken)}")]


def check_data(facts: DataFacts, heads: Mapping[str, str], of: str = "") -> list[Finding]:
    """Data and tokenizer here; `heads`: the fingerprints of run `of`, as its server knows them."""
    if facts.error:
        return [fix("data", facts.error, "get what is missing")]
    found = [ok("data", f"{facts.shards} of {facts.wanted_shards} shards of {facts.source}")]
    if not heads:
        return [*found, unknown("fingerprints", "no run here or in Redis says what they must be")]
    differing = [
        name
        for name in _CURES
        if name in facts.fingerprints and name in heads and facts.fingerprints[name] != heads[name]
    ]
    if not differing:
        return [*found, ok("fingerprints", f"those of run {of}")]
    return found + [
        fix(f"fingerprint of {name}", f"differs from that of run {of}", _CURES[name])
        for name in differing
    ]


def check_space(facts: SpaceFacts, sizes: SizeFacts | None, roles: Sequence[str]) -> list[Finding]:
    """Disk and memory, against what the configuration needs as a "server" and as a "site"."""
    if sizes is None:
        if facts.disk_free < _LITTLE_DISK:
            return [fix("disk", f"{gb(facts.disk_free)} free at {facts.base}", "make room")]
        return [ok("disk", f"{gb(facts.disk_free)} free at {facts.base}")]
    if sizes.error:
        return [unknown("sizes", sizes.error)]
    found, needs = [], sizes.values
    for role in roles:
        disk = int(needs[f"{role}_disk"]) + (int(needs["rows_disk"]) if role == "site" else 0)
        found.append(_enough(f"disk as a {role}", facts.disk_free, disk, f"free at {facts.base}"))
        memory = int(needs[f"{role}_memory"])
        found.append(_enough(f"memory as a {role}", facts.memory, memory, "in this machine"))
    shm = int(needs["shm"]) if "site" in roles else 0
    if facts.shm is not None and shm:
        found.append(_enough("shared memory", facts.shm, shm, "in /dev/shm"))
    return found


def _enough(what: str, there: int, needed: int, where: str) -> Finding:
    text = f"{gb(there)} {where}, and {gb(needed)} may be needed"
    if there >= needed:
        return ok(what, text)
    if what.startswith("shared"):
        return fix(what, text, "docker run --shm-size, or --ipc=host")
    return fix(what, text, "give it more, or take a smaller depth (python -m scripts.sizes)")


def check_writable(refused: Mapping[str, str]) -> list[Finding]:
    """`refused`: directory → why nothing can be written there ("": it can)."""
    faults = {where: why for where, why in refused.items() if why}
    if not faults:
        return [ok("write permissions", ", ".join(refused))]
    cure = "change its owner or mode, or set NANOCHAT_BASE_DIR"
    return [fix("write permissions", f"{where}: {why}", cure) for where, why in faults.items()]


def gb(size: int) -> str:
    return f"{size / 10**9:.1f} GB"


def _leading(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found.group()) if found else 0
