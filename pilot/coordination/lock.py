"""The run's lock in Redis, from both sides: renewed by a thread of the server, looked at by `pilot run`.

The round loop renews the lock at each of its ticks. It can't while it writes a snapshot, which takes minutes
for a big model, and an observer must not think that the server is dead then.
"""

import contextlib
import json
import socket
import threading

import redis

from pilot.coordination import scripts
from pilot.coordination.link import connect, run_key
from pilot.processes.ancestry import alive
from pilot.rules.rounds import Clock, MonotonicClock

RENEW_S = 3.0
ABSENT_S = 3.0  # that the lock must have been gone for, besides the time it takes to expire
_LOOK_S = 1.0


class LockRenewal:
    """A context in which a lock is renewed as long as it is ours."""

    def __init__(self, url: str, key: str, identity: str, expiry_s: float) -> None:
        self._redis = connect(url)
        self._arguments = (scripts.RENEW, 1, key, identity, str(int(expiry_s * 1000)))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run's lock", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._redis.close()

    def _run(self) -> None:
        while not self._over.wait(RENEW_S):
            with contextlib.suppress(redis.RedisError, OSError):  # the round loop says so
                self._redis.eval(*self._arguments)


class ServerWatch:
    """Whether the server of a run is there, as far as Redis knows: `begin`, then ask for its `failure`.

    `failure` is meant to be asked all the time; it asks Redis once a second.
    """

    def __init__(self, url: str, run: str, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._server_key, self._run_key = run_key(run, "server"), run_key(run, "run")
        self._redis = connect(url)
        self._before = ""  # the lock of an earlier server, perhaps a dead one
        self._holder = ""
        self._gone_since: float | None = None
        self._next_look = 0.0
        self._found: str | None = None

    def begin(self) -> None:
        """A new server is about to start."""
        self._holder, self._gone_since, self._found = "", None, None
        with contextlib.suppress(redis.RedisError, OSError):
            self._before = self._lock()

    def failure(self) -> str | None:
        """Why the server that has led the run since `begin` is gone; None if it may be there."""
        now = self._clock.now_s()
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._found = self._look(now)
        return self._found

    def _look(self, now: float) -> str | None:
        holder, state = None, None  # unknown while Redis is away
        with contextlib.suppress(redis.RedisError, OSError):
            holder, state = self._lock(), self._redis.hget(self._run_key, "state")
        if holder and holder != self._before:
            self._holder, self._gone_since = holder, None
        if not self._holder or state in ("finished", "interrupted"):
            return None  # it is yet to come, or has ended in good order
        if dead := self._dead_here(self._holder):
            return dead
        if holder != "" or state != "running":
            self._gone_since = None
            return None
        self._gone_since = now if self._gone_since is None else self._gone_since
        return "its lock in Redis has expired" if now - self._gone_since >= ABSENT_S else None

    def _dead_here(self, holder: str) -> str | None:
        """A process of this machine is looked at: neither its lock nor Redis need be waited for."""
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(holder)
            if found["host"] == socket.gethostname() and not alive(int(found["pid"])):
                return "its process was killed"
        return None

    def _lock(self) -> str:
        return str(self._redis.get(self._server_key) or "")

    def close(self) -> None:
        self._redis.close()
