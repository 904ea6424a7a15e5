"""When a round ends: one pure function of what the server knows, and the clock it is asked with."""

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pilot.config import RunConfig


class Clock(Protocol):
    """Time as the rules see it; tests pass their own."""

    def now_s(self) -> float:
        """Seconds on a clock that never goes back."""


class MonotonicClock:
    def now_s(self) -> float:
        return time.monotonic()


class EndReason(StrEnum):
    """Why a round ended; the word that logs, events and Redis show."""

    TARGET_TOKENS = "target-tokens"  # the round's clients have trained on their tokens
    RUN_TOKENS = "run-tokens"  # with this round's tokens, the run has all that it wants
    ALL_REPLIED = "all-replied"  # nobody trains any more: steps done, data used up, or errors
    MIN_DURATION = "min-duration"  # long enough, and a quorum took part
    MAX_DURATION = "max-duration"  # the hard limit
    INTERRUPTED = "interrupted"  # the run is being stopped


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


@dataclass(frozen=True)
class RoundView:
    """What the server knows of the open round: `tokens` trained on so far, by live signs and replies;
    `training`: clients at work; `pending`: messages without a reply or error."""

    elapsed_s: float
    tokens: int
    training: int
    pending: int


def end_reason(rules: RoundRules, view: RoundView) -> EndReason | None:
    """The reason why the round must end now, or None: it goes on.

    With fixed steps a client, neither tokens nor the minimum duration end a round: each client ends
    its own, and what a round does cannot depend on anybody's speed.
    """
    if view.pending == 0:
        return EndReason.ALL_REPLIED
    if view.elapsed_s >= rules.max_duration_s:
        return EndReason.MAX_DURATION
    if rules.fixed_steps:
        return None
    if 0 < rules.target_tokens <= view.tokens:
        return EndReason.TARGET_TOKENS
    if view.tokens >= rules.run_tokens_left:
        return EndReason.RUN_TOKENS
    if (
        rules.target_tokens == 0
        and view.elapsed_s >= rules.min_duration_s
        and view.training >= rules.quorum
    ):
        return EndReason.MIN_DURATION
    return None
