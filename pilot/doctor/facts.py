"""What is known of a machine and its surroundings, as the probes found it: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TorchFacts:
    """`error`: why torch could not be asked. `gpus_here`: what the driver lists; `devices`: what torch sees.

    `cuda`: what torch was built for, "" for none; `driver` of NVIDIA, "" for none.
    """

    error: str = ""
    version: str = ""
    cuda: str = ""
    driver: str = ""
    gpus_here: int = 0
    devices: tuple[str, ...] = ()
    nccl: str = ""
    mps: bool = False


@dataclass(frozen=True)
class RedisFacts:
    """`error`: why it cannot be used, a sentence with its cure. None: this user may not ask for that."""

    url: str = ""  # without credentials
    error: str = ""
    version: str = ""
    password: bool = True
    loopback: bool = True
    tls: bool = False
    maxmemory: int | None = None
    policy: str | None = None
    saves: bool | None = None  # that it wants to
    last_save_ok: bool | None = None
    writes: str = ""  # why writing failed


@dataclass(frozen=True)
class ClockFacts:
    """`ahead_s`: this clock less the server's, known to `good_to_s`; None: nobody can be asked, since `why`."""

    ahead_s: float | None = None
    good_to_s: float = 0.0
    of: str = ""
    why: str = ""


@dataclass(frozen=True)
class SpaceFacts:
    """Bytes. `disk`: where the base directory is; `shm` None: this system has no /dev/shm."""

    base: str = ""
    disk_free: int = 0
    memory: int = 0
    shm: int | None = None


@dataclass(frozen=True)
class FlowerFacts:
    """`version` is installed, `wanted` what pilot asks for. `refused`: why the connection cannot be used.

    `ca`: the file by which its SuperLink is known, if it has TLS and a CA of its own.
    """

    version: str = ""
    wanted: str = ""
    fits: bool = True
    connection: str = ""
    address: str = ""
    local: bool = False
    refused: str = ""
    insecure: bool = False
    ca: str = ""

    @property
    def url(self) -> str:
        """Where the SuperLink answers; "" if there is none."""
        if self.local or not self.address or "://" in self.address:
            return "" if self.local else self.address
        return f"{'http' if self.insecure else 'https'}://{self.address}"


@dataclass(frozen=True)
class DataFacts:
    """Of a configuration on this machine. `error`: what is missing, a sentence with its cure."""

    error: str = ""
    source: str = ""
    shards: int = 0
    wanted_shards: int = 0
    fingerprints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SizeFacts:
    """What a configuration needs, in bytes, by the names of `run/sizes.py`; `error`: why that is not known."""

    error: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PortFacts:
    """A port of this machine that `pilot up` takes by default, and whether it is free."""

    port: int
    what: str
    free: bool
