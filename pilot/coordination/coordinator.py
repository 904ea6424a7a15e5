"""Every Redis key of a run: the server's half. A client's is client.py, an operator's operator.py.

All keys are `pilot:<run>:…`, so runs on one Redis do not see each other, and nothing is ever flushed. Durable
keys hold the truth; a publish only wakes those who wait for it:

    server           string, expires   the server that leads the run: host, run directory, token
    round            hash              term, round, phase (open|ended), reason
    run              hash              term, state (running|finished|interrupted)
    progress         string, expires   how far the run is, for people (server/public.py)
    stop             string, expires   why the run is to end once its open round is merged
    client:<name>    hash, expires     a client's last heartbeat in a round
    stop:<name>      string, expires   why this client is to leave; it gets no new work meanwhile
    ack:<name>       string, expires   the fence of this client's last reply that the server has on disk
    signals          channel           "look at the keys"

What only the leading server may write is written by Lua scripts that check the lock first: between a check
and a separate write, another server could take over. Redis may be away or lose everything (`link.py`): the
server then continues with what Flower reports and writes its keys again, and a client trains until the seconds
in its order are over.
"""

import json
import os
import secrets
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import redis

from pilot.coordination import link, scripts
from pilot.coordination.client import ClientCoordinator, fence_text
from pilot.coordination.heartbeats import Ages, Heard
from pilot.coordination.link import CoordinatorError, RedisLink, ping, resolve_url, table
from pilot.coordination.lock import LockRenewal
from pilot.coordination.stop_reasons import DRAINED, PROVISIONED
from pilot.redis_url import redact_url
from pilot.rules.rounds import Clock, MonotonicClock
from pilot.wire.messages import Fence, plain

__all__ = ["ClientCoordinator", "CoordinatorError", "ServerCoordinator", "ping", "resolve_url"]

SERVER_EXPIRY_S = 15.0
FINISHED_EXPIRY_S = 24 * 3600
STOP_EXPIRY_S = 3600.0
ACK_EXPIRY_S = 24 * 3600.0
PROGRESS_EXPIRY_S = 3600.0  # with what is left of it, a reader knows how old it is
DRAIN_EXPIRY_S = 30 * 24 * 3600.0  # nobody drains a client for longer; no key stays for ever


class ServerCoordinator:
    """The server's half. One live server per run: constructing a second one fails.

    Raises CoordinatorError if Redis cannot be reached at the start, or if another server leads the run;
    later only if another server has taken over.
    """

    def __init__(
        self, url: str, run: str, *, term: int, run_dir: Path, clock: Clock | None = None
    ) -> None:
        ping(url)
        self.url = url
        self._clock = clock or MonotonicClock()
        self._link = RedisLink(url, run, self._clock)
        self._where = {"host": socket.gethostname(), "run_dir": str(run_dir.resolve())}
        self._identity = json.dumps(
            {**self._where, "pid": os.getpid(), "token": secrets.token_hex(8)}
        )
        self._round: dict[str, Any] = {"term": term, "round": 0, "phase": "ended", "reason": ""}
        self._state = "running"
        self._term = term
        self._ages = Ages(self._clock)
        # key → (value, when it expires): written again when Redis has lost its keys
        self._notes: dict[str, tuple[str, float]] = {}
        try:
            self._lead()
        except (redis.RedisError, CoordinatorError) as error:
            self._link.close()
            if isinstance(error, CoordinatorError):
                raise
            reason = link.explained(error)
            raise CoordinatorError(f"cannot use Redis at {redact_url(url)} ({reason})") from error

    def _lead(self) -> None:
        """Take the run's lock. One of this host and run directory was left by a dead server: the caller
        holds the directory's file lock, which only one living process can."""
        key, expiry_ms = self._link.key("server"), int(SERVER_EXPIRY_S * 1000)
        holder = str(self._link.redis.get(key) or "")
        other = table(holder)
        ours = all(other.get(name) == value for name, value in self._where.items())
        if (holder and not ours) or not self._link.redis.eval(
            scripts.TAKE, 1, key, holder, self._identity, str(expiry_ms)
        ):
            raise CoordinatorError(
                f"run {self._link.run} is already led by process {other.get('pid')} on "
                f"{other.get('host')}: stop it or choose another run-name"
            )

    def lock_renewed(self) -> LockRenewal:
        """A context in which the lock is renewed also while this thread has no time to `tick`."""
        return LockRenewal(self.url, self._link.key("server"), self._identity, SERVER_EXPIRY_S)

    # -- the round and the run -------------------------------------------------------------------

    def open_round(self, round_number: int) -> None:
        """From now on, clients may train in (term, round)."""
        self._round = {"term": self._term, "round": round_number, "phase": "open", "reason": ""}
        self._ages.forget()
        self.tick()

    def end_round(self, reason: str) -> None:
        """Stop all clients of the round: the durable key first, then the wake-up."""
        self._round |= {"phase": "ended", "reason": reason}
        self.tick()
        self._wake()

    def tick(self) -> None:
        """Write the current state again: renews the lock, and restores the keys that Redis has lost.

        Raises CoordinatorError if another server leads the run by now: two would confuse the clients.
        """
        values = [self._identity, int(SERVER_EXPIRY_S * 1000), *self._round.values(), self._state]
        found = self._leading(scripts.TICK, ["server", "round", "run"], values)
        if found == 2 and self._notes:
            now = self._clock.now_s()
            self._notes = {key: note for key, note in self._notes.items() if note[1] > now}
            self._note({key: (value, at - now) for key, (value, at) in self._notes.items()})

    def finish(self, run_finished: bool = False) -> None:
        """Leave the run: end the round, free the lock, let the keys expire in a day.

        `run_finished`: the run has reached its end; otherwise it was interrupted and may be resumed.
        """
        self._state = "finished" if run_finished else "interrupted"
        try:
            self.end_round(self._round["reason"] or self._state)
            keys = ["server", "stop", "round", "run"]  # a wish that the run may end is fulfilled
            self._leading(
                scripts.RELEASE, keys, [self._identity, FINISHED_EXPIRY_S], must_lead=False
            )
        except CoordinatorError:
            pass  # another server leads the run: the keys are that server's now
        self._link.close()

    # -- operators -------------------------------------------------------------------------------

    def stop_wish(self) -> str:
        """Why the run is to end once its open round is merged; "" if it is not, or while that is unknown."""
        key = self._link.key("stop")
        return plain(str(self._link.attempt("reading", lambda: self._link.redis.get(key)) or ""))

    def publish(self, progress: Mapping[str, Any]) -> None:
        """Let operators see how far the run is (`server/public.py`)."""
        text = json.dumps(progress, separators=(",", ":"))
        values = [self._identity, text, int(PROGRESS_EXPIRY_S * 1000)]
        self._leading(scripts.NOTE, ["server", "progress"], values)

    # -- single clients --------------------------------------------------------------------------

    @property
    def failing(self) -> bool:
        """Whether this server's last attempt to use Redis failed."""
        return self._link.failing

    def heartbeats(self, clients: Iterable[str]) -> dict[str, Heard]:
        """The last heartbeat in this round of each of `clients` that has sent one.

        Its age grows when a client falls silent, but not while Redis fails for this server, which cannot know
        then.
        """
        names = list(clients)

        def read() -> list[dict[str, str]]:
            with self._link.redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(self._link.key(f"client:{name}"))
                # a key that is no hash, which anybody may have written, says nothing of its client
                found = pipe.execute(raise_on_error=False)
            return [values if isinstance(values, dict) else {} for values in found]

        found = self._link.attempt("reading", read)
        if self._link.failing:
            self._ages.forget()
        current = (str(self._round["term"]), str(self._round["round"]))
        heard = {}
        for name, values in zip(names, found or [], strict=False):
            ours = (values.get("term"), values.get("round")) == current
            if (last := self._ages.of(name, values if ours else None)) is not None:
                heard[name] = last
        return heard

    def acknowledge(self, client: str, fence: Fence) -> None:
        """Confirm to `client` that its reply with `fence` is on this server's disk: its node may leave."""
        self._note({f"ack:{client}": (fence_text(fence), ACK_EXPIRY_S)})
        self._wake()

    def stop_client(self, client: str, reason: str) -> None:
        """Make `client` finish its micro-step, reply, and take no new work for at most an hour.

        Not called by the round loop: operators set the key (docs/deployment.md), tests and benchmarks call
        this.
        """
        self._note({f"stop:{client}": (reason or "asked to leave", STOP_EXPIRY_S)})
        self._wake()

    def clear_client_stop(self, client: str) -> None:
        """Let `client` work again, whether an operator, `stop_client` or the client itself stopped it."""
        self._note({f"stop:{client}": ("", 0.0)})

    def draining(self, clients: Iterable[str]) -> dict[str, str]:
        """Those of `clients` that are leaving, with the reason: they get no new work for now."""
        names = list(clients)
        keys = [self._link.key(name) for name in ("server", *(f"stop:{name}" for name in names))]
        found: Any = self._link.attempt("reading", lambda: self._link.redis.mget(keys)) or [None]
        pairs = zip(names, found[1:], strict=False)
        reasons = {name: plain(str(reason)) for name, reason in pairs if reason}
        if found[0]:  # else Redis has lost its keys, and `tick` will restore them
            self._remember_drains(names, reasons)
        return reasons

    def _remember_drains(self, names: Iterable[str], reasons: Mapping[str, str]) -> None:
        """What an operator wished of clients is written again, too, when Redis has lost it.

        Not what a provisioner wished, which renews it itself.
        """
        until_s = self._clock.now_s() + DRAIN_EXPIRY_S
        for name in names:
            key, reason = f"stop:{name}", reasons.get(name, "")
            if reason.startswith(DRAINED) and not reason.startswith(PROVISIONED):
                self._notes[key] = (reason, until_s)
            elif self._notes.get(key, ("", 0.0))[0].startswith(DRAINED):
                del self._notes[key]

    # -- writing as the leader -------------------------------------------------------------------

    def _note(self, notes: Mapping[str, tuple[str, float]]) -> None:
        """Set keys to (value, seconds to live), again if Redis loses them; a value of "" deletes its key."""
        now = self._clock.now_s()
        values: list[str | int] = [self._identity]
        for key, (value, expiry_s) in notes.items():
            values += [value, int(expiry_s * 1000)]
            if value:
                self._notes[key] = (value, now + expiry_s)
            else:
                self._notes.pop(key, None)
        self._leading(scripts.NOTE, ["server", *notes], values)

    def _leading(
        self, script: str, names: list[str], values: list[Any], *, must_lead: bool = True
    ) -> int | None:
        """Run `script` on keys. Returns its answer, or None while Redis fails.

        Raises CoordinatorError if `must_lead` and another server leads the run by now.
        """
        keys = [self._link.key(name) for name in names]
        found: Any = self._link.attempt(
            "writing", lambda: self._link.redis.eval(script, len(keys), *keys, *map(str, values))
        )
        if found == 0 and must_lead:
            raise CoordinatorError(
                f"another server has taken over run {self._link.run}: this one stops"
            )
        return found

    def _wake(self) -> None:
        channel, text = self._link.key("signals"), json.dumps(self._round)
        self._link.attempt("writing", lambda: self._link.redis.publish(channel, text))
