"""Every Redis key of a run: a client's half."""

import itertools
import json
import secrets
from dataclasses import asdict
from typing import Any

import redis

from pilot.coordination.heartbeats import COUNTER
from pilot.coordination.link import TIMEOUT_S, RedisLink
from pilot.coordination.stop_reasons import ANNOUNCED
from pilot.rules.rounds import Clock, MonotonicClock
from pilot.wire.messages import Fence, Heartbeat


def fence_text(fence: Fence) -> str:
    """A fence as it stands in an `ack:` key."""
    return json.dumps(asdict(fence), sort_keys=True)


class ClientCoordinator:
    """A client's half, for one round of one term. No method raises because Redis is away."""

    def __init__(
        self,
        url: str,
        run: str,
        *,
        client: str,
        term: int,
        round_number: int,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._link = RedisLink(url, run, self._clock)
        self._client, self._mine = client, (term, round_number)
        self._listener: Any = None
        self._nonce, self._sent = secrets.token_hex(4), itertools.count()

    # -- what the keys say -----------------------------------------------------------------------

    def round_over(self) -> str | None:
        """Why this round is over, by its durable key; None while it runs, or while that is unknown."""
        current, ended, run_over = self._look()
        if current > self._mine:
            return "a later round"
        return (ended or run_over) if current == self._mine else None

    def superseded(self) -> str | None:
        """Why replies to this round are no longer accepted; None while they are, or while that is unknown."""
        current, _, run_over = self._look()
        if current > self._mine:
            return "a later round"
        return run_over if current == self._mine else None

    def _look(self) -> tuple[tuple[int, int], str | None, str | None]:
        """The server's (term, round), why that round is over, why the run is over (None: it is not).

        (0, 0) while that is unknown.
        """

        def read() -> list[dict[str, str]]:
            with self._link.redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(self._link.key("round"))
                pipe.hgetall(self._link.key("run"))
                return pipe.execute()

        found, run = self._link.attempt("reading", read) or ({}, {})
        if not found:
            return (0, 0), None, None
        try:
            current = (int(found.get("term", "")), int(found.get("round", "")))
        except ValueError:  # not what the server wrote, which writes it again within a second
            return (0, 0), None, None
        ended = (found.get("reason") or "ended") if found.get("phase") == "ended" else None
        state = run.get("state", "running")
        over = run.get("term") == found["term"] and state != "running"
        return current, ended, state if over else None

    def told_to_leave(self) -> str | None:
        """Why this client is to leave, by its `stop:` key; None if it is not, or while that is unknown.

        What the client itself announced does not count: its own reason may no longer hold.
        """
        key = self._link.key(f"stop:{self._client}")
        reason: Any = self._link.attempt("reading", lambda: self._link.redis.get(key))
        return None if not reason or reason.startswith(ANNOUNCED) else reason

    def acknowledged(self, fence: Fence) -> bool:
        """Whether the server has the reply with `fence` on its disk."""
        key = self._link.key(f"ack:{self._client}")
        return self._link.attempt("reading", lambda: self._link.redis.get(key)) == fence_text(fence)

    @property
    def failing(self) -> bool:
        """Whether the last attempt to use Redis failed: the answers of the other methods are then unknown."""
        return self._link.failing

    # -- listening -------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> None:
        """Sleep until something is published, at most `timeout_s`."""
        until_s = self._clock.now_s() + timeout_s
        if not self._link.attempt("reading", lambda: self._receive(timeout_s)):  # don't spin
            self._clock.sleep(max(0.0, until_s - self._clock.now_s()))

    def _receive(self, timeout_s: float) -> bool:
        if self._listener is None:
            listener = self._link.redis.pubsub(ignore_subscribe_messages=True)
            listener.subscribe(self._link.key("signals"))
            listener.get_message(timeout=TIMEOUT_S)  # the confirmation
            self._listener = listener
            return (
                True  # what was published before is in the keys only: the caller reads them again
            )
        try:
            self._listener.get_message(timeout=timeout_s)
        except redis.RedisError:
            self._listener.close()
            self._listener = None
            raise
        return True

    # -- what this client announces --------------------------------------------------------------

    def send_heartbeat(self, heartbeat: Heartbeat, *, expiry_s: float) -> None:
        """Tell the server how far this client is; Redis forgets it after `expiry_s`."""
        self._send(asdict(heartbeat), expiry_s)

    def send_state(self, state: str, *, expiry_s: float) -> None:
        """A heartbeat of a process that knows only the state: how far the client is stays as it was said."""
        self._send({"state": state}, expiry_s)

    def _send(self, values: dict[Any, Any], expiry_s: float) -> None:
        term, round_number = self._mine
        own: dict[Any, Any] = {"client": self._client, "term": term, "round": round_number}

        def write() -> None:
            key = self._link.key(f"client:{self._client}")
            # never the same twice, not even from another process or after Redis lost its keys
            own[COUNTER] = f"{self._nonce}-{next(self._sent)}"
            with self._link.redis.pipeline(transaction=True) as pipe:
                pipe.hset(key, mapping=own | values)
                pipe.pexpire(key, int(expiry_s * 1000))
                pipe.execute()

        self._link.attempt("writing", write)

    def announce_leave(self, reason: str, *, expiry_s: float) -> None:
        """Announce that this client leaves of its own accord: it gets no new work for `expiry_s`."""
        self.stop(ANNOUNCED + reason, expiry_s=expiry_s)

    def stop(self, reason: str, *, expiry_s: float) -> None:
        """Set this client's `stop:` key unless it is set."""
        key, expiry_ms = self._link.key(f"stop:{self._client}"), int(expiry_s * 1000)
        self._link.attempt(
            "writing", lambda: self._link.redis.set(key, reason, px=expiry_ms, nx=True)
        )

    def clear_stop(self, reason: str) -> None:
        """Delete this client's `stop:` key if it begins with `reason`; a stop with another reason stays."""
        key = self._link.key(f"stop:{self._client}")
        self._link.attempt("writing", lambda: self._link.delete_if_begins(key, reason))

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._link.close()
