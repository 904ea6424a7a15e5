"""Every Redis key of a run: the server's half and the client's half.

All keys stand under `pilot:<run>:`, so runs on one Redis don't see each other, and nothing is ever
flushed. Durable keys say what is true; a publish only wakes whoever listens:

    server           string, expires   who leads the run: host, run directory, token
    round            hash              term, round, phase (open|ended), reason
    client:<name>    hash, expires     a client's last sign of life
    signals          channel           "the round's key has changed"

Redis may be away or lose everything. The server then goes on with what Flower tells it and writes its
keys anew at every tick; a client goes on until the seconds that its order gave it are over. Each
outage is one log line when it starts and one when it ends.
"""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pilot.config import PilotError, Scalar, check_redis_url, redact_url

URL_VARIABLE = "PILOT_REDIS_URL"
SERVER_EXPIRY_S = 15.0
FINISHED_EXPIRY_S = 24 * 3600
_TIMEOUT_S = 2.0

log = logging.getLogger("pilot")
T = TypeVar("T")


class CoordinatorError(PilotError):
    """Redis can't be used for this run; the message says why and what to do."""


def resolve_url(configured: str) -> str:
    """`PILOT_REDIS_URL` on any machine wins, else `configured`; "" if there is neither."""
    url = os.environ.get(URL_VARIABLE, "") or configured
    if url:
        check_redis_url(url, URL_VARIABLE if os.environ.get(URL_VARIABLE) else "redis-url")
    return url


class _Connection:
    """A Redis client whose failures are counted and told once, never raised in mid-run."""

    def __init__(self, url: str, run: str) -> None:
        self.url, self.run = url, run
        self.prefix = f"pilot:{run}:"
        self.redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            # redis-py's own three retries would stop the round loop for seconds; ours is the next tick
            retry=Retry(NoBackoff(), 0),
        )
        self._failing: set[str] = set()  # of "reading", "writing"
        self._down_since = 0.0

    def key(self, name: str) -> str:
        return self.prefix + name

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The result of `action`, or None while Redis fails; changes of state are logged once.

        `what` is "reading" or "writing": a Redis that is full, or can't save, refuses only the latter.
        """
        try:
            result = action()
        except (redis.RedisError, OSError) as error:
            if not self._failing:
                self._down_since = time.monotonic()
                url = redact_url(self.url)
                log.warning("Redis at %s fails, going on: %s (%s)", url, error, what)
            self._failing.add(what)
            return None
        if what in self._failing:
            self._failing.discard(what)
            if not self._failing:
                away_s = time.monotonic() - self._down_since
                log.warning("Redis at %s is back after %.1f s", redact_url(self.url), away_s)
        return result

    def close(self) -> None:
        self.redis.close()


def ping(url: str) -> None:
    """Raise CoordinatorError with one sentence if Redis doesn't answer at `url`."""
    connection = _Connection(url, "")
    try:
        connection.redis.ping()
    except redis.AuthenticationError as error:
        raise CoordinatorError(
            f"Redis at {redact_url(url)} refuses the login: set {URL_VARIABLE} with user and password"
        ) from error
    except redis.RedisError as error:
        raise CoordinatorError(
            f"cannot reach Redis at {redact_url(url)} ({error}): start it, or set {URL_VARIABLE}"
        ) from error
    finally:
        connection.close()


class ServerCoordinator:
    """The server's half. One live server a run: a second one is refused when it is made.

    Raises CoordinatorError if Redis cannot be reached at the start, or another server leads the run.
    """

    def __init__(self, url: str, run: str, *, term: int, run_dir: Path) -> None:
        ping(url)
        self.url = url
        self._connection = _Connection(url, run)
        self._identity = {
            "host": socket.gethostname(),
            "run_dir": str(run_dir.resolve()),
            "pid": os.getpid(),
            "token": secrets.token_hex(8),
        }
        self._round: dict[Any, Any] = {"term": term, "round": 0, "phase": "ended", "reason": ""}
        self._term = term
        try:
            self._lead()
        except (redis.RedisError, CoordinatorError) as error:
            self._connection.close()
            if isinstance(error, CoordinatorError):
                raise
            raise CoordinatorError(f"cannot use Redis at {redact_url(url)} ({error})") from error

    def _lead(self) -> None:
        """Take the run's lock. One on this host for the same directory is a dead server's: the caller
        holds the directory's file lock, which only one living process can."""
        redis, key = self._connection.redis, self._connection.key("server")
        expiry_ms = int(SERVER_EXPIRY_S * 1000)
        if redis.set(key, json.dumps(self._identity), nx=True, px=expiry_ms):
            return
        other = self._holder()
        if other and any(other.get(name) != self._identity[name] for name in ("host", "run_dir")):
            raise CoordinatorError(
                f"run {self._connection.run} is already led by process {other.get('pid')} on "
                f"{other.get('host')}: stop it or choose another run-name"
            )
        redis.set(key, json.dumps(self._identity), px=expiry_ms)

    def _holder(self) -> dict[str, Any]:
        """Who holds the run's lock; empty if nobody does."""
        return json.loads(self._connection.redis.get(self._connection.key("server")) or "{}")

    @property
    def _leads(self) -> bool:
        """Whether the lock is ours or free: it expires while a server is stopped or cut off."""
        return self._holder().get("token", self._identity["token"]) == self._identity["token"]

    def open_round(self, round_number: int) -> None:
        """From now on clients of (term, round) may train."""
        self._round = {"term": self._term, "round": round_number, "phase": "open", "reason": ""}
        self.tick()

    def end_round(self, reason: str) -> None:
        """All clients of the round stop: the durable key first, then the wake-up."""
        self._round |= {"phase": "ended", "reason": reason}
        self.tick()
        channel = self._connection.key("signals")
        self._connection.attempt(
            "writing", lambda: self._connection.redis.publish(channel, json.dumps(self._round))
        )

    def tick(self) -> None:
        """Write what is true once more: renews the lock, and heals a Redis that lost its keys.

        Raises CoordinatorError if another server leads the run by now: two would spoil its clients.
        """

        def write() -> bool:
            if not self._leads:
                return False
            with self._connection.redis.pipeline(transaction=True) as pipe:
                pipe.set(
                    self._connection.key("server"),
                    json.dumps(self._identity),
                    px=int(SERVER_EXPIRY_S * 1000),
                )
                pipe.hset(self._connection.key("round"), mapping=self._round)
                pipe.persist(self._connection.key("round"))
                pipe.execute()
            return True

        if self._connection.attempt("writing", write) is False:
            raise CoordinatorError(
                f"another server has taken over run {self._connection.run}: this one stops"
            )

    def heartbeats(self, clients: Iterable[str]) -> dict[str, dict[str, str]]:
        """The last sign of life in this round of each of `clients` that has given one."""
        names = list(clients)

        def read() -> list[dict[str, str]]:
            with self._connection.redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(self._connection.key(f"client:{name}"))
                return pipe.execute()

        beats = self._connection.attempt("reading", read) or []
        current = (str(self._round["term"]), str(self._round["round"]))
        return {
            name: beat
            for name, beat in zip(names, beats, strict=False)
            if (beat.get("term"), beat.get("round")) == current
        }

    def finish(self) -> None:
        """Let go of the run: the round is ended, the lock free, the keys expire in a day."""

        def release() -> None:
            if not self._leads:
                return
            self.end_round(self._round["reason"] or "finished")
            with self._connection.redis.pipeline(transaction=True) as pipe:
                pipe.delete(self._connection.key("server"))
                pipe.expire(self._connection.key("round"), FINISHED_EXPIRY_S)
                pipe.execute()

        self._connection.attempt("writing", release)
        self._connection.close()


class ClientCoordinator:
    """A client's half, for one round of one term. Nothing here raises because Redis is away."""

    def __init__(self, url: str, run: str, *, client: str, term: int, round_number: int) -> None:
        self._connection = _Connection(url, run)
        self._client, self._mine = client, (term, round_number)
        self._listener: Any = None

    def round_over(self) -> str | None:
        """Why this round is over, by its durable key; None while it runs, or if nobody can tell."""
        found = self._connection.attempt(
            "reading", lambda: self._connection.redis.hgetall(self._connection.key("round"))
        )
        if not found:
            return None
        current = (int(found["term"]), int(found["round"]))
        if current > self._mine:
            return "a later round"
        if current == self._mine and found["phase"] == "ended":
            return str(found["reason"]) or "ended"
        return None

    def wait(self, timeout_s: float) -> None:
        """Sleep until something is published, at most `timeout_s`."""
        before = time.monotonic()
        self._connection.attempt("reading", lambda: self._receive(timeout_s))
        if self._listener is None:  # not connected: don't spin
            time.sleep(max(0.0, timeout_s - (time.monotonic() - before)))

    def _receive(self, timeout_s: float) -> None:
        if self._listener is None:
            listener = self._connection.redis.pubsub(ignore_subscribe_messages=True)
            listener.subscribe(self._connection.key("signals"))
            listener.get_message(timeout=_TIMEOUT_S)  # the confirmation
            self._listener = listener
            return  # what was published before stands in the key only: look at it again
        try:
            self._listener.get_message(timeout=timeout_s)
        except redis.RedisError:
            self._listener.close()
            self._listener = None
            raise

    def beat(self, values: Mapping[str, Scalar], *, expiry_s: float) -> None:
        """Tell the server how far this client is; forgotten after `expiry_s`."""
        term, round_number = self._mine
        mapping: dict[Any, Any] = {
            name: int(value) if isinstance(value, bool) else value for name, value in values.items()
        }

        def write() -> None:
            key = self._connection.key(f"client:{self._client}")
            with self._connection.redis.pipeline(transaction=True) as pipe:
                pipe.hset(key, mapping={"term": term, "round": round_number, **mapping})
                pipe.pexpire(key, int(expiry_s * 1000))
                pipe.execute()

        self._connection.attempt("writing", write)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._connection.close()
