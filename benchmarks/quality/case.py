"""What can be trained in the laboratory: a model's scale, and a way of training."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The model and the length of a run; `batch_tokens` are those of an optimizer step of plain training."""

    name: str
    depth: int
    vocab_size: int
    sequence_len: int
    batch_tokens: int
    total_tokens: int
    lr: float
    weight_decay: float = 0.0

    @property
    def shape(self) -> dict[str, int]:
        """What `corpus` needs to know of it."""
        sizes = {"vocab_size": self.vocab_size, "sequence_len": self.sequence_len}
        return sizes | {"tokens": self.total_tokens}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way of training at a scale. `clients` 0 is plain training. Every field is that of all clients.

    Work. `steps`: optimizer steps of a client in a round, times its speed; `phases`: (share of the run, steps)
    instead, each until that share is trained. `speeds`: of the clients, 1 where none is given. `batch`: whether
    `batch_tokens`, times `batch_factor`, are those of a client's step or of all clients' of a round together
    ("federation", shared as `rules/batch.py` does it). `shares`: of the latter, by "speed" (all then take
    equally many steps) or "equal" (the fast take more).

    Who is there. `away`: the share of clients that a round does without, drawn at random, at least one stays;
    `away_rounds`: for how long. `trace`: who is there instead, for `away_rounds` rounds each, and from the
    start again; with `away_rounds` 0 each for an equal part of the run. `alone`: for this share of the run
    there is only the first.

    Merges. `weights`: what a client counts in the mean, "tokens", "tokens2/steps", "steps" or "equal".
    `late`: the share of replies, drawn at random, that arrive a round late: they count `late_weight` times in
    the next merge; 0: they are refused, and their rows and inner states are those of before. `delayed`: every
    update is merged a round late, and this share of its own is what a client is ahead of the model with which
    it begins (arXiv 2502.12996); None: at once.

    States. `inner`: what a client begins a round with of its optimizer's state, "keep" its own, "recent" the
    same but nothing after a round without it, "reset" nothing, "average" that of all who were there.

    `config`: run-config keys of the outer step, `wire-up` and `wire-down`. `momentum_follows_lr`: whether the
    outer momentum, which is made of earlier rounds' longer updates, is shortened as the schedule lowers the
    rates.
    """

    name: str
    clients: int = 0
    steps: int = 30
    phases: tuple[tuple[float, int], ...] = ()
    speeds: tuple[float, ...] = ()
    batch: str = "client"
    batch_factor: float = 1.0
    shares: str = "speed"
    away: float = 0.0
    away_rounds: int = 1
    trace: tuple[tuple[int, ...], ...] = ()
    alone: float = 0.0
    weights: str = "tokens"
    late: float = 0.0
    late_weight: float = 0.0
    delayed: float | None = None
    inner: str = "keep"
    momentum_follows_lr: bool = False
    lr_factor: float = 1.0
    config: tuple[tuple[str, Any], ...] = ()

    def but(self, name: str, **changes: Any) -> "Case":
        """The same but for some fields; `config` is a mapping here."""
        if "config" in changes:
            changes["config"] = tuple(sorted({**dict(self.config), **changes["config"]}.items()))
        return dataclasses.replace(self, name=name, **changes)

    def steps_at(self, done: float) -> int:
        """Optimizer steps of a round that begins when this share of the run is done."""
        return next((steps for until, steps in self.phases if done < until), self.steps)


@dataclass
class Outcome:
    """`curve`: (tokens, bpb); `rounds` that merged something; `norms` and `cosines` of their outer steps: the
    length of each, and its cosine with the one before; `agreement`: the cosine of two clients' updates;
    `sent`: bytes per parameter of an update; `received`: of what a client that misses no round is sent of the
    model; `refused`: tokens that were trained on and never merged."""

    bpb: float
    curve: list[tuple[int, float]]
    rounds: int
    seconds: float
    norms: list[float]
    cosines: list[float]
    agreement: list[float]
    sent: float
    received: float
    refused: int
