"""A connection to Redis that may fail: nothing stops for that, and each outage is logged once.

Redis may be away, refuse the login, be full or lose everything, in the middle of a run. A read is then None, a
write is dropped, and the next attempt is the caller's next tick. After a timeout (a broken network) nothing is
attempted for a while: otherwise a loop of attempts would spend all of its time waiting.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pilot.errors import PilotError
from pilot.processes.waiting import wait_until
from pilot.redis_url import check_redis_url, redact_url
from pilot.rules.rounds import Clock, MonotonicClock

URL_VARIABLE = "PILOT_REDIS_URL"
TIMEOUT_S = 2.0
_KEYS_S = 3.0
PAUSE_S = 4.0  # after a timeout: at most a third of a caller's time is spent waiting

SETTLED_S = 10.0  # without a refusal: only then is an outage of reading or of writing over
_ALL = "all"

log = logging.getLogger("pilot")
T = TypeVar("T")


class CoordinatorError(PilotError):
    """Redis cannot be used for this run; the message says why and what to do."""


def resolve_url(configured: str) -> str:
    """`PILOT_REDIS_URL` of this machine, or else `configured`; "" if neither is set."""
    url = os.environ.get(URL_VARIABLE, "") or configured
    if url:
        check_redis_url(url, URL_VARIABLE if os.environ.get(URL_VARIABLE) else "redis-url")
    return url


def connect(url: str) -> redis.Redis:
    """A connection that gives up after TIMEOUT_S, and takes any bytes that a client may have written."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        encoding_errors="replace",
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        # redis-py's own three retries would stop the round loop for seconds; ours is the next tick
        retry=Retry(NoBackoff(), 0),
    )


def run_key(run: str, name: str) -> str:
    """The key of `name` among those of a run."""
    return f"pilot:{run}:{name}"


def table(text: Any) -> dict[str, Any]:
    """A JSON table that Redis holds; an empty one if it is none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class RedisLink:
    """One process's connection for one run, whose keys are `pilot:<run>:…`."""

    def __init__(self, url: str, run: str, clock: Clock | None = None) -> None:
        self.url, self.run = url, run
        self._clock = clock or MonotonicClock()
        self.redis = connect(url)
        self._failing: set[str] = set()  # of "reading", "writing"
        self._outages: dict[str, float] = {}  # of these that Redis refuses, or _ALL → since when
        self._works_since_s: dict[str, float] = {}  # during an outage
        self._try_again_at = float("-inf")

    def key(self, name: str) -> str:
        return run_key(self.run, name)

    @property
    def failing(self) -> bool:
        """Whether the last attempt to read, or the last to write, failed."""
        return bool(self._failing)

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The result of `action`, or None while Redis fails. The begin and the end of an outage are logged.

        `what` is "reading" or "writing": a Redis that is full, or cannot save, refuses only writes. That is an
        outage of its own, which is over once none has been refused for some seconds.
        """
        if self._clock.now_s() < self._try_again_at:
            return None
        try:
            result = action()
        except (redis.RedisError, OSError) as error:
            self._note_failure(what, error)
            return None
        self._note_success(what)
        return result

    def _note_failure(self, what: str, error: Exception) -> None:
        now_s = self._clock.now_s()
        self._failing.add(what)
        self._works_since_s.pop(what, None)
        if isinstance(error, redis.TimeoutError | TimeoutError):
            self._try_again_at = now_s + PAUSE_S
        refused = isinstance(error, redis.ResponseError)  # it answers, but does not do this
        kind, since_s = what if refused else _ALL, now_s
        if refused:
            since_s = self._outages.pop(_ALL, now_s)
        if kind not in self._outages:
            self._outages[kind] = since_s
            url, why = redact_url(self.url), explained(error)
            log.warning(
                "Redis at %s unavailable while %s (%s); continuing without it", url, what, why
            )

    def _note_success(self, what: str) -> None:
        self._failing.discard(what)
        if not self._outages:
            return
        now_s = self._clock.now_s()
        works_since_s = self._works_since_s.setdefault(what, now_s)
        if _ALL in self._outages and not self._failing:
            self._end_outage(_ALL, "", now_s)
        # at the limit of its memory, Redis refuses one write and takes the next
        if what in self._outages and now_s - works_since_s >= SETTLED_S:
            self._end_outage(what, f" for {what}", works_since_s)

    def _end_outage(self, kind: str, for_what: str, at_s: float) -> None:
        away_s = at_s - self._outages.pop(kind)
        self._works_since_s.pop(kind, None)
        log.warning("Redis at %s is back%s after %.1f s", redact_url(self.url), for_what, away_s)

    def delete_if_begins(self, key: str, prefix: str) -> None:
        """Delete a string that begins with `prefix`, unless it changes just then: what was set stays.

        No script: the clients of a fleet may run none (pilot/fleet/redis_users.py).
        """
        with self.redis.pipeline() as pipe, contextlib.suppress(redis.WatchError):
            pipe.watch(key)
            value: Any = pipe.get(key)
            if value and str(value).startswith(prefix):
                pipe.multi()
                pipe.delete(key)
                pipe.execute()

    def close(self) -> None:
        self.redis.close()


def explained(error: Exception) -> str:
    """What Redis or its client says, with the cure where one is known."""
    if isinstance(error, redis.ResponseError) and "maxmemory" in str(error):
        return f"{error} It is full: raise its maxmemory, or give the run a Redis of its own"
    return str(error)


def check_run(url: str, run: str) -> None:
    """Raise CoordinatorError, with one sentence, if no Redis answers at `url` or it is not that of `run`."""
    ping(url)
    link = RedisLink(url, run)
    keys = [link.key("server"), link.key("round")]
    try:
        # one that has lost its keys gets them back within a second
        found = wait_until(lambda: bool(link.redis.exists(*keys)), timeout_s=_KEYS_S, poll_s=0.2)
    except redis.RedisError as error:
        raise CoordinatorError(f"cannot read Redis at {redact_url(url)} ({error})") from error
    finally:
        link.close()
    if not found:
        raise CoordinatorError(
            f"the Redis at {redact_url(url)} holds nothing of run {run}, so it is another one than the "
            f"server's: set {URL_VARIABLE} to the server's Redis"
        )


def ping(url: str, *, within_s: float = 0.0) -> None:
    """Raise CoordinatorError, with one sentence, if no Redis answers at `url` within `within_s` seconds.

    It is asked once at least, and a login that it refuses is not tried again.
    """
    link, failures = RedisLink(url, ""), list[redis.RedisError]()

    def answers() -> bool:
        try:
            return bool(link.redis.ping())
        except redis.AuthenticationError as error:
            raise CoordinatorError(
                f"Redis at {redact_url(url)} refuses the login: put user and password in {URL_VARIABLE}"
            ) from error
        except redis.RedisError as error:
            failures.append(error)
            return False

    try:
        if not wait_until(answers, timeout_s=within_s, poll_s=0.5):
            raise CoordinatorError(
                f"cannot reach Redis at {redact_url(url)} ({failures[-1]}): start it, or set {URL_VARIABLE}"
            ) from failures[-1]
    finally:
        link.close()
