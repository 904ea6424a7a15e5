"""Learning rates, momentum and weight decay as functions of the global step. Pure.

Steps may be fractional: a federation counts them in committed tokens over tokens per step. Past its
end a schedule stays at its last value, since a federation may train a little past its token target.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError

REFERENCE_BATCH_TOKENS = 2**19  # the batch at which the learning rates were tuned
_REFERENCE_DEPTH = 12  # and the depth at which the weight decay was

SCHEDULE_KINDS = ("pilot", "upstream")


@dataclass(frozen=True)
class Hyper:
    """What an optimizer step needs to know of its place in the run."""

    lr_multiplier: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Schedule:
    """A run of `total_steps`: warmup, constant, linear warmdown; `weight_decay` is the scaled one.

    `momentum_end` None keeps the peak in the warmdown. The defaults are Pilot's.
    """

    total_steps: float
    weight_decay: float
    warmup_steps: float = 0.0
    warmdown_ratio: float = 0.4
    final_lr_fraction: float = 0.0
    momentum_start: float = 0.85
    momentum_peak: float = 0.95
    momentum_ramp_steps: float = 300.0
    momentum_end: float | None = None
    cosine_weight_decay: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.total_steps < math.inf:
            raise UserError(f"the run has {self.total_steps} steps: train for at least one")
        if not 0 <= self.warmup_steps < math.inf:
            raise UserError(f"warmup_steps is {self.warmup_steps}: it must not be negative")
        if not 0 <= self.warmdown_ratio <= 1:
            raise UserError(f"warmdown_ratio is {self.warmdown_ratio}: it must be from 0 to 1")

    def at(self, step: float) -> Hyper:
        """The values for the optimizer step that begins when `step` steps are done."""
        step = min(max(step, 0.0), self.total_steps)
        return Hyper(self._lr_multiplier(step), self._momentum(step), self._weight_decay(step))

    def _warmdown(self, step: float) -> float:
        """How much of the warmdown is over, from 0 (not begun) to 1."""
        steps = self.warmdown_ratio * self.total_steps
        if steps == 0:
            return 0.0
        return min(1.0, max(0.0, (step - (self.total_steps - steps)) / steps))

    def _lr_multiplier(self, step: float) -> float:
        up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        done = self._warmdown(step)
        return min(up, (1 - done) + done * self.final_lr_fraction)

    def _momentum(self, step: float) -> float:
        ramp = min(1.0, step / self.momentum_ramp_steps) if self.momentum_ramp_steps > 0 else 1.0
        momentum = (1 - ramp) * self.momentum_start + ramp * self.momentum_peak
        if self.momentum_end is None or ramp < 1.0:
            return momentum
        done = self._warmdown(step)
        return (1 - done) * self.momentum_peak + done * self.momentum_end

    def _weight_decay(self, step: float) -> float:
        share = step / self.total_steps
        left = 0.5 * (1 + math.cos(math.pi * share)) if self.cosine_weight_decay else 1 - share
        return self.weight_decay * left


def make_schedule(
    kind: str,
    *,
    total_steps: float,
    weight_decay: float,
    warmup_steps: float | None = None,
    warmdown_ratio: float | None = None,
    final_lr_fraction: float | None = None,
) -> Schedule:
    """Pilot's schedule or upstream's of July 2026; what is not None replaces its own value."""
    if kind not in SCHEDULE_KINDS:
        raise UserError(f"schedule is {kind!r}: choose one of {', '.join(SCHEDULE_KINDS)}")
    schedule = Schedule(total_steps=total_steps, weight_decay=weight_decay)
    if kind == "upstream":
        schedule = dataclasses.replace(
            schedule,
            warmup_steps=40.0,
            warmdown_ratio=0.65,
            final_lr_fraction=0.05,
            momentum_peak=0.97,
            momentum_ramp_steps=400.0,
            momentum_end=0.90,
            cosine_weight_decay=True,
        )
    given = (
        ("warmup_steps", warmup_steps),
        ("warmdown_ratio", warmdown_ratio),
        ("final_lr_fraction", final_lr_fraction),
    )
    for name, value in given:
        if value is not None:
            changes: dict[str, Any] = {name: value}
            schedule = dataclasses.replace(schedule, **changes)
    return schedule


def scale_lr_for_batch(total_batch_tokens: float) -> float:
    """The factor on all learning rates for a batch of that many tokens: sqrt(B / 2^19)."""
    return math.sqrt(total_batch_tokens / REFERENCE_BATCH_TOKENS)


def scale_weight_decay(weight_decay: float, depth: int) -> float:
    """Pilot's scaling: deeper models are decayed less, by (12 / depth)^2."""
    return weight_decay * (_REFERENCE_DEPTH / depth) ** 2


def scale_weight_decay_for_tokens(
    weight_decay: float, *, total_batch_tokens: float, train_tokens: float, reference_tokens: float
) -> float:
    """Upstream's scaling: sqrt(B / 2^19) * D_ref / D; a depth-12 model trains on D_ref tokens."""
    batch = math.sqrt(total_batch_tokens / REFERENCE_BATCH_TOKENS)
    return weight_decay * batch * reference_tokens / train_tokens


@dataclass(frozen=True)
class LearningRates:
    """Initial rates by role: before the width scaling of AdamW, after any batch scaling."""

    matrix: float
    embedding: float
    unembedding: float
    scalar: float
    smear: float  # smear gate and lambda, backout lambda

    def scaled(self, factor: float) -> "LearningRates":
        """All rates times `factor`.

        Upstream leaves the smear group out of its batch scaling, and small batches diverge (4,096
        tokens per step, depth 4: validation loss after 80 steps 4.63, against 4.15 with it).
        """
        return LearningRates(*(factor * rate for rate in dataclasses.astuple(self)))

    def replace(self, **rates: float) -> "LearningRates":
        return dataclasses.replace(self, **rates)


_LEARNING_RATES = {
    "classic": LearningRates(0.02, 0.3, 0.004, 0.5, 0.2),
    "modern": LearningRates(0.02, 0.3, 0.008, 0.5, 0.2),
}


def learning_rates(
    arch: str,
    *,
    lr: float | None = None,
    matrix_lr: float | None = None,
    embedding_lr: float | None = None,
    unembedding_lr: float | None = None,
    scalar_lr: float | None = None,
) -> LearningRates:
    """An architecture's rates. `lr` is Muon's; the others keep their ratio to it unless given.

    matrix_lr is Muon's alone, as upstream's: the others do not follow it.
    """
    rates = _LEARNING_RATES[arch]
    if lr is not None:
        rates = rates.scaled(lr / rates.matrix)
    given = {
        "matrix": matrix_lr,
        "embedding": embedding_lr,
        "unembedding": unembedding_lr,
        "scalar": scalar_lr,
    }
    return rates.replace(**{k: v for k, v in given.items() if v is not None})
