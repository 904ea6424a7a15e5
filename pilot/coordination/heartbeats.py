"""Heartbeats as they lie in Redis: how long they are kept there, and how old they are."""

from dataclasses import dataclass, field

from pilot.rules.rounds import Clock
from pilot.wire.messages import Heartbeat

COUNTER = "beat"  # the field of a heartbeat that every new one changes
# Redis keeps a heartbeat for this many intervals, and at least for this many seconds.
_EXPIRY_HEARTBEATS, _EXPIRY_MIN_S = 10.0, 10.0


def heartbeat_expiry_s(heartbeat_s: float) -> float:
    """How long Redis keeps the last heartbeat of a client that sends one every `heartbeat_s`."""
    return max(_EXPIRY_MIN_S, _EXPIRY_HEARTBEATS * heartbeat_s)


@dataclass(frozen=True)
class Heard:
    """A client's last heartbeat in this round, `age_s` seconds ago as this server saw it."""

    heartbeat: Heartbeat
    age_s: float


@dataclass
class Ages:
    """How old the heartbeats of one round are, by the server's own clock.

    What counts is that the counter in the heartbeat has changed, not what a client's clock says. While Redis
    fails nothing is known of any client, so none ages: `forget` lets all start again.
    """

    clock: Clock
    _seen: dict[str, tuple[dict[str, str], float]] = field(default_factory=dict)

    def forget(self) -> None:
        self._seen.clear()

    def of(self, name: str, found: dict[str, str] | None) -> Heard | None:
        """The last heartbeat of `name`; `found` is what Redis holds now, if anything."""
        now_s = self.clock.now_s()
        seen = self._seen.get(name)
        if found and (seen is None or seen[0].get(COUNTER) != found.get(COUNTER)):
            self._seen[name] = seen = (found, now_s)
        return None if seen is None else Heard(Heartbeat.from_redis(seen[0]), now_s - seen[1])
