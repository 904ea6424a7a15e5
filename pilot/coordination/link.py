"""A connection to Redis that may fail: nothing stops for that, and each outage is logged once.

Redis may be away, refuse the login, be full or lose everything, in the middle of a run. A read is then None, a
write is dropped, and the next attempt is the caller's next tick. After a timeout (a broken network) nothing is
attempted for a while: otherwise a loop of attempts would spend all of its time waiting.
"""

import logging
import os
from collections.abc import Callable
from typing import TypeVar

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


class RedisLink:
    """One process's connection for one run, whose keys are `pilot:<run>:…`."""

    def __init__(self, url: str, run: str, clock: Clock | None = None) -> None:
        self.url, self.run = url, run
        self._clock = clock or MonotonicClock()
        self.redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",  # any client may write any bytes
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            # redis-py's own three retries would stop the round loop for seconds; ours is the next tick
            retry=Retry(NoBackoff(), 0),
        )
        self._failing: set[str] = set()  # of "reading", "writing"
        self._down_since = self._try_again_at = float("-inf")

    def key(self, name: str) -> str:
        return f"pilot:{self.run}:{name}"

    @property
    def failing(self) -> bool:
        """Whether the last attempt to read, or the last to write, failed."""
        return bool(self._failing)

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The result of `action`, or None while Redis fails. The begin and the end of an outage are logged.

        `what` is "reading" or "writing": a Redis that is full, or cannot save, refuses only writes.
        """
        if self._clock.now_s() < self._try_again_at:
            return None
        try:
            result = action()
        except (redis.RedisError, OSError) as error:
            now = self._clock.now_s()
            if not self._failing:
                self._down_since = now
                url = redact_url(self.url)
                log.warning(
                    "Redis at %s unavailable while %s (%s); continuing without it", url, what, error
                )
            self._failing.add(what)
            if isinstance(error, redis.TimeoutError | TimeoutError):
                self._try_again_at = now + PAUSE_S
            return None
        if what in self._failing:
            self._failing.discard(what)
            if not self._failing:
                away_s = self._clock.now_s() - self._down_since
                log.warning("Redis at %s is back after %.1f s", redact_url(self.url), away_s)
        return result

    def close(self) -> None:
        self.redis.close()


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


def ping(url: str) -> None:
    """Raise CoordinatorError, with one sentence, if no Redis answers at `url`."""
    link = RedisLink(url, "")
    try:
        link.redis.ping()
    except redis.AuthenticationError as error:
        raise CoordinatorError(
            f"Redis at {redact_url(url)} refuses the login: put user and password in {URL_VARIABLE}"
        ) from error
    except redis.RedisError as error:
        raise CoordinatorError(
            f"cannot reach Redis at {redact_url(url)} ({error}): start it, or set {URL_VARIABLE}"
        ) from error
    finally:
        link.close()
