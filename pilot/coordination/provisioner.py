"""Every Redis key of a run: what a provisioner looks at, and the wish with which it drains a client.

No method raises because Redis is away; what is not known is None.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pilot.coordination.heartbeats import COUNTER
from pilot.coordination.link import RedisLink
from pilot.coordination.stop_reasons import ANNOUNCED, OF_NODE, PROVISIONED
from pilot.rules.rounds import Clock
from pilot.wire.messages import plain

# As `pilot drain` writes it: the client replies and gets no new work until the key is gone.
DRAIN_EXPIRY_S = 3600.0  # renewed all the time: what a dead provisioner wished is over some day
_BUSY = ("evaluating", "training")  # states of a heartbeat in which devices compute
_OWN_REASONS = (ANNOUNCED, OF_NODE, PROVISIONED)


@dataclass(frozen=True)
class ClientKeys:
    """What a client's keys say. `fence`: (term, round) of its heartbeat, (0, 0) if there is none; `beat`:
    what every new heartbeat changes; `acknowledged`: (term, round) of its last reply that is on the
    server's disk."""

    fence: tuple[int, int] = (0, 0)
    beat: str = ""
    state: str = ""
    stop: str = ""
    acknowledged: tuple[int, int] = (0, 0)

    @property
    def busy(self) -> bool:
        return self.state in _BUSY

    @property
    def held(self) -> str:
        """Why somebody else wants it to get no work; "" if nobody does."""
        return "" if self.stop.startswith(_OWN_REASONS) else self.stop

    @property
    def drained_by_us(self) -> bool:
        return self.stop.startswith(PROVISIONED)


@dataclass(frozen=True)
class RunKeys:
    """What a run's keys say. `led`: a server leads it now; `state`: running, finished, interrupted, ""
    (unknown)."""

    led: bool = False
    state: str = ""
    current: tuple[int, int] = (0, 0)
    clients: Mapping[str, ClientKeys] = field(default_factory=dict)


class ProvisionerCoordinator:
    """One provisioner's connection for one run."""

    def __init__(self, url: str, run: str, clock: Clock | None = None) -> None:
        self._link = RedisLink(url, run, clock)

    def look(self, names: Iterable[str]) -> RunKeys | None:
        """What the keys of the run and of the clients `names` say; None while Redis fails."""
        wanted = list(names)
        link = self._link

        def read() -> list[Any]:
            with link.redis.pipeline(transaction=False) as pipe:
                pipe.get(link.key("server"))
                pipe.hgetall(link.key("run"))
                pipe.hgetall(link.key("round"))
                for name in wanted:
                    pipe.hgetall(link.key(f"client:{name}"))
                    pipe.get(link.key(f"stop:{name}"))
                    pipe.get(link.key(f"ack:{name}"))
                # a key of another type, which anybody may have written, says nothing
                return pipe.execute(raise_on_error=False)

        found = link.attempt("reading", read)
        if found is None:
            return None
        server, run, current, *rest = found
        clients = {
            name: _client(*rest[3 * place : 3 * place + 3]) for place, name in enumerate(wanted)
        }
        state = plain(str(_hash(run).get("state", "")))
        return RunKeys(isinstance(server, str) and bool(server), state, _fence(current), clients)

    def drain(self, client: str, reason: str, keys: ClientKeys) -> None:
        """Ask `client` to reply and take no new work, unless somebody else has; `keys`: as they were seen
        last."""
        key, expiry_ms = self._link.key(f"stop:{client}"), int(DRAIN_EXPIRY_S * 1000)

        def write() -> None:
            if keys.drained_by_us:
                self._link.redis.pexpire(key, expiry_ms)
            elif self._link.redis.set(
                key, plain(f"{PROVISIONED}: {reason}"), px=expiry_ms, nx=True
            ):
                self._link.redis.publish(self._link.key("signals"), "{}")  # "look at the keys"

        self._link.attempt("writing", write)

    def undrain(self, client: str) -> bool:
        """Take our wish back; another's stays. False while Redis fails."""
        key = self._link.key(f"stop:{client}")

        def clear() -> bool:
            self._link.delete_if_begins(key, PROVISIONED)
            return True

        return bool(self._link.attempt("writing", clear))

    def close(self) -> None:
        self._link.close()


def _hash(found: Any) -> dict[str, str]:
    return found if isinstance(found, dict) else {}


def _fence(found: Any) -> tuple[int, int]:
    """(term, round) of a hash; (0, 0) if it says nothing of the kind."""
    values = _hash(found)
    try:
        return int(values.get("term", 0)), int(values.get("round", 0))
    except ValueError:
        return (0, 0)


def _client(heartbeat: Any, stop: Any, ack: Any) -> ClientKeys:
    values = _hash(heartbeat)
    return ClientKeys(
        _fence(heartbeat),
        str(values.get(COUNTER, "")),
        str(values.get("state", "")),
        plain(stop) if isinstance(stop, str) else "",
        _acknowledged(ack),
    )


def _acknowledged(text: Any) -> tuple[int, int]:
    try:
        fence = json.loads(text) if isinstance(text, str) else {}
        return int(fence["term"]), int(fence["round_number"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return (0, 0)
