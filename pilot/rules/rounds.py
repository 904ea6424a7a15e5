"""When a round ends, whether a client may still join it, and how long to wait for replies.

Pure functions of what the server knows, asked again at every tick. Time comes in as seconds since the round
opened; the clock itself is the caller's.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pilot.config import RunConfig

# A client that misses this many heartbeats counts as dead until it is heard again.
MISSED_HEARTBEATS = 3
# ... but not sooner than this: a worker that shares a busy machine may be late by itself.
_SILENCE_MIN_S = 2.0
# The wait for replies is this many times the slowest upload that is usual, or longer where that is worth it ...
_GRACE_FACTOR = 2.0
# ... and at least this long: what was measured may have been a quiet moment (seconds).
_GRACE_MIN_S = 5.0
# A round opens without a client that may come, after this share of what rounds last, within these
# bounds (seconds): it may still join, and all the others would stand still.
_RETURN_SHARE, _RETURN_MIN_S, _RETURN_MAX_S = 0.1, 2.0, 15.0
# What starting a worker group and moving a small model costs, until it has been measured (seconds).
_FIXED_COST_S = 15.0
# A client that was asked is given this many times what it needed to begin before, or what the slowest other
# needed, and at least this long (seconds): it may have to start its workers again.
_BEGIN_FACTOR, _BEGIN_MIN_S = 2.0, 2 * _FIXED_COST_S
# Rounds in a row for which a client came too late, before no round waits for it to begin ...
MAX_LATE_ROUNDS = 3
# ... but one in this many: it may have become faster
_LATE_AGAIN_EVERY = 10
# A client that cannot hear the end of a round trains for this share of its expected length.
_BLIND_SHARE = 0.7
# No worker counts as hanging sooner (seconds).
_STUCK_MIN_S = 120.0


class Clock(Protocol):
    """Time as the rules see it; tests pass their own."""

    def now_s(self) -> float:
        """Seconds on a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Let so much time pass on this clock."""


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class EndReason(StrEnum):
    """Why a round ended; the word that logs, events and Redis show."""

    TARGET_TOKENS = "target-tokens"  # the round's clients have trained on their tokens
    RUN_TOKENS = "run-tokens"  # with this round's tokens, the run has all that it wants
    ALL_REPLIED = "all-replied"  # nobody trains any more: steps done, leases used up, or leaving
    DATA_EXHAUSTED = "data-exhausted"  # the same, and no row is left to lease
    NOBODY_LEFT = "nobody-left"  # nobody trains any more, and nobody has replied
    MIN_DURATION = "min-duration"  # long enough, and a quorum took part
    MAX_DURATION = "max-duration"  # the hard limit
    STOPPED = "stopped"  # an operator wishes the run to end: what its clients have is merged first
    INTERRUPTED = "interrupted"  # the run is being stopped, and nothing is waited for


@dataclass(frozen=True)
class RoundRules:
    """The limits of one round; `run_tokens_left` is what the run still wants when the round opens."""

    min_duration_s: float
    max_duration_s: float
    quorum: int
    target_tokens: int
    run_tokens_left: int
    fixed_steps: bool

    @staticmethod
    def of(config: RunConfig, *, run_tokens_left: int) -> "RoundRules":
        return RoundRules(
            min_duration_s=config.round_min_duration,
            max_duration_s=config.round_max_duration,
            quorum=config.quorum,
            target_tokens=config.target_tokens,
            run_tokens_left=run_tokens_left,
            fixed_steps=config.round_steps > 0,
        )

    @property
    def tokens_wanted(self) -> int:
        """Tokens of all clients at which the round has done its work."""
        if self.target_tokens:
            return min(self.target_tokens, self.run_tokens_left)
        return self.run_tokens_left


@dataclass(frozen=True)
class RoundView:
    """What the server knows of the open round.

    `tokens` trained on so far, by live signs and replies; `tokens_per_s` of those at work.
    Clients: `pending` owe a reply; `silent` of those are not heard any more; `training` have begun to
    train or have replied with work; `replied` is how many of those have replied; `waiting` are new ones
    that could take work. `rows_left`: some row can still be leased. `starting` were sent rows and may still
    begin, the last of them in at most `begin_left_s` seconds: until then neither tokens nor the minimum
    duration end the round, or they would have been asked for nothing.
    """

    elapsed_s: float
    tokens: int
    training: int
    pending: int
    replied: int = 0
    silent: int = 0
    waiting: int = 0
    tokens_per_s: float = 0.0
    rows_left: bool = True
    starting: int = 0
    begin_left_s: float = 0.0


def end_reason(rules: RoundRules, view: RoundView) -> EndReason | None:
    """The reason why the round must end now, or None while it continues.

    With fixed steps per client, neither tokens nor the minimum duration end a round: each client ends
    its own, and what a round does cannot depend on anybody's speed.
    """
    if view.pending == 0 and not view.replied:
        return EndReason.NOBODY_LEFT
    if view.pending == view.silent and (view.replied or view.waiting):
        # A client that is only silent may be back, so a round of silent clients continues, at no cost, until
        # another one comes that can do its work.
        if not view.replied:
            return EndReason.NOBODY_LEFT
        return EndReason.ALL_REPLIED if view.rows_left else EndReason.DATA_EXHAUSTED
    if view.elapsed_s >= rules.max_duration_s:
        return EndReason.MAX_DURATION
    if rules.fixed_steps:
        return None
    reached = 0 < rules.target_tokens <= view.tokens
    if reached and not view.starting:
        return EndReason.TARGET_TOKENS
    if view.tokens >= rules.run_tokens_left:
        return EndReason.TARGET_TOKENS if reached else EndReason.RUN_TOKENS
    if (
        not view.starting
        and rules.target_tokens == 0
        and view.elapsed_s >= rules.min_duration_s
        and view.training + view.waiting >= rules.quorum
    ):
        return EndReason.MIN_DURATION
    return None


def remaining_s(rules: RoundRules, view: RoundView) -> float:
    """Seconds until the round ends, as far as one can tell now."""
    at_most = left = rules.max_duration_s - view.elapsed_s
    if not rules.fixed_steps:
        if view.tokens >= rules.run_tokens_left:
            return 0.0
        if view.tokens >= rules.tokens_wanted:
            left = 0.0
        elif view.tokens_per_s > 0:
            left = min(left, (rules.tokens_wanted - view.tokens) / view.tokens_per_s)
        if rules.target_tokens == 0 and view.training + view.waiting >= rules.quorum:
            left = min(left, rules.min_duration_s - view.elapsed_s)
    return max(0.0, min(at_most, max(left, view.begin_left_s)))


def join_min_remaining_s(configured_s: float, fixed_costs_s: Sequence[float]) -> float:
    """Seconds that must be left of a round for a client to be sent work in it.

    `configured_s` 0: twice the median of what a round costs a client besides training (`fixed_costs_s`).
    """
    if configured_s > 0:
        return configured_s
    return 2 * (statistics.median(fixed_costs_s) if fixed_costs_s else _FIXED_COST_S)


def begin_patience_s(begin_s: float | None, others_s: Sequence[float]) -> float:
    """Seconds from its order for which a round waits for a client to take its first step.

    `begin_s` is what the client needed before (None: not known yet), `others_s` what others needed.
    """
    longest_s = max(others_s, default=0.0) if begin_s is None else begin_s
    return max(_BEGIN_MIN_S, _BEGIN_FACTOR * longest_s)


def waits_for_beginning(late_rounds: int) -> bool:
    """Whether a round waits for a client to begin that came too late for its last `late_rounds` rounds."""
    return late_rounds < MAX_LATE_ROUNDS or late_rounds % _LATE_AGAIN_EVERY == 0


def fixed_cost_s(measured_s: float | None) -> float:
    """Seconds that a round costs a client besides training, as `measured_s` or as it is with a small model."""
    return _FIXED_COST_S if measured_s is None else measured_s


def blind_seconds(
    config: RunConfig, lengths_s: Sequence[float], elapsed_s: float = 0.0
) -> float | None:
    """Seconds for which a client may train that cannot hear the end of the round; None: not known yet.

    `lengths_s` of the last rounds, `elapsed_s` of this one. With fixed steps it ends by itself.
    """
    whole_s = config.round_max_duration - elapsed_s
    if config.round_steps:
        return max(0.0, whole_s)
    if config.target_tokens:
        if not lengths_s:
            return None
        expected_s = min(lengths_s)
    else:
        expected_s = config.round_min_duration
    return max(0.0, min(whole_s, _BLIND_SHARE * expected_s - elapsed_s))


def grace_s(uploads_s: Sequence[float], grace_max_s: float, *, worth_s: float = 0.0) -> float:
    """Seconds for which replies are waited for after the end of a round.

    `uploads_s`: what the clients needed from the end of their last round to their reply's arrival. `worth_s`:
    how long the others may stand still before that costs more training than the missing replies hold.
    """
    if not uploads_s:
        return grace_max_s
    return min(grace_max_s, max(_GRACE_MIN_S, _GRACE_FACTOR * max(uploads_s), worth_s))


def return_s(lengths_s: Sequence[float]) -> float:
    """Seconds for which a round does not open for clients that may come; `lengths_s` of the last ones."""
    if not lengths_s:
        return _RETURN_MAX_S
    usual_s = _RETURN_SHARE * statistics.median(lengths_s)
    return min(_RETURN_MAX_S, max(_RETURN_MIN_S, usual_s))


def stuck_s(grace_max_s: float) -> float:
    """Seconds in which a worker that should stop shows no sign of it, after which it counts as hanging.

    What it would answer later than `grace_max_s` is refused anyway; a slow device may need a minute for a step.
    """
    return max(_STUCK_MIN_S, grace_max_s)


def silence_s(heartbeat_s: float) -> float:
    """Seconds without a heartbeat after which a client counts as dead."""
    return max(_SILENCE_MIN_S, MISSED_HEARTBEATS * heartbeat_s)
