"""Every Redis key of a run: an operator's half, who looks at all of them and writes two kinds of wish.

`stop` asks the run to end once its open round is merged; a `stop:<name>` that begins with DRAINED asks one
client to reply and take no new work, until the operator takes it back. Unlike the server's half, these methods
raise: a person waits for the answer.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from pilot.coordination import scripts
from pilot.coordination.coordinator import DRAIN_EXPIRY_S, PROGRESS_EXPIRY_S, STOP_EXPIRY_S
from pilot.coordination.link import CoordinatorError, connect, ping, run_key, table
from pilot.coordination.stop_reasons import DRAINED
from pilot.redis_url import redact_url
from pilot.wire.messages import Heartbeat, plain

MAX_KEYS = 10_000  # that are looked at, of one Redis


@dataclass(frozen=True)
class Beat:
    """A client's last heartbeat, which Redis keeps for another `left_s` seconds."""

    heartbeat: Heartbeat
    term: int
    round_number: int
    left_s: float


@dataclass(frozen=True)
class Live:
    """What the keys of a run say now. `leader` is empty while no server leads it.

    `state` is running, finished, interrupted, or "" if Redis has never heard of the run. `progress` is what
    the server published `progress_age_s` seconds ago; empty if it has not.
    """

    run: str
    leader: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    term: int = 0
    round_number: int = 0
    round_open: bool = False
    reason: str = ""
    progress: Mapping[str, Any] = field(default_factory=dict)
    progress_age_s: float = 0.0
    beats: Mapping[str, Beat] = field(default_factory=dict)
    leaving: Mapping[str, str] = field(default_factory=dict)
    stop: str = ""  # why it is to end

    @property
    def known(self) -> bool:
        return bool(self.leader or self.state)


class Operator:
    """A connection for people. Raises CoordinatorError, with one sentence, where Redis refuses something."""

    def __init__(self, url: str) -> None:
        ping(url)
        self._url, self._redis = url, connect(url)

    def __enter__(self) -> "Operator":
        return self

    def __exit__(self, *_: object) -> None:
        self._redis.close()

    # -- looking ---------------------------------------------------------------------------------

    def runs(self) -> list[str]:
        """The names of all runs of which there are keys."""
        with self._explained():
            found = {key.split(":")[1] for key in self._scan("pilot:*:run")}
            return sorted(found | {key.split(":")[1] for key in self._scan("pilot:*:server")})

    def look(self, run: str) -> Live:
        """All that the keys of `run` say."""
        with self._explained():
            clients = self._names(run, "client")
            stops = self._names(run, "stop")
            with self._redis.pipeline(transaction=False) as pipe:
                pipe.get(run_key(run, "server"))
                pipe.hgetall(run_key(run, "round"))
                pipe.hgetall(run_key(run, "run"))
                pipe.get(run_key(run, "progress"))
                pipe.pttl(run_key(run, "progress"))
                pipe.get(run_key(run, "stop"))
                for name in clients:
                    pipe.hgetall(run_key(run, f"client:{name}"))
                    pipe.pttl(run_key(run, f"client:{name}"))
                for name in stops:
                    pipe.get(run_key(run, f"stop:{name}"))
                found = pipe.execute(raise_on_error=False)
        for refused in found:
            if isinstance(refused, NoPermissionError):
                raise CoordinatorError(self._not_allowed(refused))
        return _live(run, found, clients, stops)

    def _names(self, run: str, kind: str) -> list[str]:
        prefix = run_key(run, f"{kind}:")
        return sorted(key.removeprefix(prefix) for key in self._scan(f"{prefix}*"))

    def _scan(self, pattern: str) -> Iterator[str]:
        return itertools.islice(self._redis.scan_iter(match=pattern, count=1000), MAX_KEYS)

    # -- wishing ---------------------------------------------------------------------------------

    def stop(self, run: str, reason: str) -> None:
        """Ask the server of `run` to merge what the open round has, write its snapshot, and end."""
        with self._explained():
            key = run_key(run, "stop")
            self._redis.set(key, plain(reason) or "asked to stop", px=int(STOP_EXPIRY_S * 1000))

    def drain(self, run: str, client: str, reason: str) -> None:
        """Ask `client` to finish its micro-step and reply; it gets no new work until `undrain`."""
        with self._explained():
            key = run_key(run, f"stop:{client}")
            self._redis.set(key, plain(DRAINED + reason), px=int(DRAIN_EXPIRY_S * 1000))
            self._redis.publish(run_key(run, "signals"), "{}")

    def undrain(self, run: str, client: str) -> str:
        """Let `client` work again. Returns another reason for which it is to leave; "" if there is none."""
        with self._explained():
            key = run_key(run, f"stop:{client}")
            was: Any = self._redis.eval(scripts.CLEAR, 1, key, DRAINED)
            return "" if str(was).startswith(DRAINED) else plain(str(was))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except NoPermissionError as error:
            raise CoordinatorError(self._not_allowed(error)) from error
        except (redis.RedisError, OSError) as error:
            raise CoordinatorError(f"Redis at {redact_url(self._url)} fails ({error})") from error

    def _not_allowed(self, error: Exception) -> str:
        return (
            f"Redis at {redact_url(self._url)} does not let this user see all of a run ({error}): "
            "use the server's login, on the server's machine"
        )


def _live(run: str, found: Sequence[Any], clients: Sequence[str], stops: Sequence[str]) -> Live:
    """`found`: six keys of the run; then a hash and its milliseconds for each of `clients`; a text for each of
    `stops`."""
    leader, current, state, progress, progress_ms, stop, *rest = found
    current, state = _hash(current), _hash(state)
    beats = {}
    for index, name in enumerate(clients):
        values, left_ms = _hash(rest[2 * index]), rest[2 * index + 1]
        if values:
            term, number = _whole(values.get("term")), _whole(values.get("round"))
            left_s = max(0.0, _whole(left_ms) / 1000)
            beats[name] = Beat(Heartbeat.from_redis(values), term, number, left_s)
    reasons = zip(stops, rest[2 * len(clients) :], strict=False)
    return Live(
        run,
        leader=table(leader),
        state=plain(str(state.get("state", ""))),
        term=_whole(current.get("term")),
        round_number=_whole(current.get("round")),
        round_open=current.get("phase") == "open",
        reason=plain(str(current.get("reason", ""))),
        progress=table(progress),
        progress_age_s=max(0.0, PROGRESS_EXPIRY_S - _whole(progress_ms) / 1000),
        beats=beats,
        leaving={name: plain(why) for name, why in reasons if isinstance(why, str)},
        stop=plain(stop) if isinstance(stop, str) else "",
    )


def _hash(found: Any) -> dict[str, str]:
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (ValueError, TypeError):
        return 0
