"""One federation from its first round to its last, deterministic, in one process.

The real Trainer, optimizers, schedule, weighted mean and outer step; clients take turns. Left out are messages,
clocks, and rules of admission. Plain training is the case without clients: the same steps on the same rows in
the same order, without rounds.
"""

import copy
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.text import Corpus, corpus
from nanochat.loss_eval import bits_per_byte, bpb_sums
from nanochat.optim import MuonAdamW
from nanochat.trainer import Trainer
from pilot import plan
from pilot.config import RunConfig
from pilot.rules.aggregation import weighted_mean
from pilot.rules.outer import outer_step, restores_lengths
from pilot.wire.codec import DECAY, decode, encode

_CPU = torch.device("cpu")
# Of a run, besides the last, and on how many validation rows: 16 on all of them took a third of its time.
_EVALUATIONS, _CURVE_ROWS = 8, 128
Tensors = dict[str, Tensor]


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
    """A way of training at a scale. `clients` 0 is plain training.

    `steps`: optimizer steps of a client in a round, times its speed. `batch`: whether `batch_tokens` are those
    of a client's step or of all clients' together ("federation": a client that is alone takes whole steps).
    `speeds`: of the clients, 1 where none is given. `away`: the share of clients that a round does without,
    drawn at random, at least one stays; `away_rounds`: for how long. `inner`: what a client begins a
    round with of its optimizer's state, "keep" its own, "reset" nothing, "average" that of all who were there.
    `weights`: what a client counts in the mean, "tokens", "steps" or "equal". `config`: run-config keys of the
    outer step, and `wire-up`. `momentum_follows_lr`: whether the outer momentum, which is made of earlier
    rounds' longer updates, is shortened as the schedule lowers the clients' rates.
    """

    name: str
    clients: int = 0
    steps: int = 30
    batch: str = "client"
    speeds: tuple[float, ...] = ()
    away: float = 0.0
    away_rounds: int = 1
    inner: str = "keep"
    momentum_follows_lr: bool = False
    weights: str = "tokens"
    lr_factor: float = 1.0
    config: tuple[tuple[str, Any], ...] = ()

    def but(self, name: str, **changes: Any) -> "Case":
        """The same but for some fields; `config` is a mapping here."""
        if "config" in changes:
            changes["config"] = tuple(sorted({**dict(self.config), **changes["config"]}.items()))
        return dataclasses.replace(self, name=name, **changes)


@dataclass
class Outcome:
    """`curve`: (tokens, bpb); `rounds` that merged something; `norms` and `cosines` of their outer steps: the
    length of each, and its cosine with the one before; `agreement`: the cosine of two clients' updates;
    `sent`: bytes per parameter of an update."""

    bpb: float
    curve: list[tuple[int, float]]
    rounds: int
    seconds: float
    norms: list[float]
    cosines: list[float]
    agreement: list[float]
    sent: float


def train(scale: Scale, case: Case, seed: int, text: Path, cache: Path) -> dict[str, Any]:
    """Train a case in this process, with one thread: its outcome and what it is of."""
    torch.set_num_threads(1)
    outcome = Laboratory(scale, case, seed, corpus(text, cache, **scale.shape)).run()
    return {"scale": scale.name, "case": case.name, "seed": seed} | dataclasses.asdict(outcome)


class Laboratory:
    """Trains `case` with `seed`, which sets the first weights, the order of rows, and who is away when."""

    def __init__(self, scale: Scale, case: Case, seed: int, corpus: Corpus) -> None:
        self.scale, self.case, self.corpus = scale, case, corpus
        self.config = RunConfig.from_mapping(
            {
                "run-name": "quality",
                "seed": seed,
                "depth": scale.depth,
                "vocab-size": scale.vocab_size,
                "sequence-len": scale.sequence_len,
                "total-batch-size": scale.batch_tokens,
                "device-batch-size": max(1, scale.batch_tokens // scale.sequence_len),
                "total-tokens": scale.total_tokens,
                "lr": scale.lr * case.lr_factor,
                "weight-decay": scale.weight_decay,
                **dict(case.config),
            }
        )
        self.rng = np.random.default_rng([seed, 1])
        self.order = np.random.default_rng([seed, 2]).permutation(len(corpus.rows))
        self.model = plan.build_model(self.config, device=_CPU, compute_dtype=torch.float32)
        self.weights: Tensors = plan.initial_weights(self.config)
        self.model.load_state_dict(self.weights)
        self.schedule = plan.schedule(self.config, total_tokens=scale.total_tokens)
        self.states: dict[int, Any] = {}
        self.outer: Tensors = {}
        self.taken = self.tokens = 0
        self.curve: list[tuple[int, float]] = []
        self.absent_until: dict[int, int] = {}
        self.norms: list[float] = []
        self.cosines: list[float] = []
        self.agreement: list[float] = []
        self.rests: dict[int, Tensors] = {}
        self.sent_bytes = self.sent_values = 0
        self._step_before: Tensors = {}
        self._rate_before = 1.0

    def run(self) -> Outcome:
        began_s, rounds = time.monotonic(), 0
        if self.case.clients:
            while self.tokens < self.scale.total_tokens:
                self._round(rounds)
                rounds += 1
                self._note_progress()
        else:
            self._plain()
        seconds = time.monotonic() - began_s
        bpb = self._bpb()
        self.curve.append((self.tokens, bpb))
        sent = round(self.sent_bytes / max(1, self.sent_values), 4)
        figures = (self.norms, self.cosines, self.agreement, sent)
        return Outcome(bpb, self.curve, rounds, seconds, *figures)

    # -- plain -----------------------------------------------------------------------------------

    def _plain(self) -> None:
        trainer = self._trainer(plan.make_optimizer(self.config, self.model))
        while self.tokens < self.scale.total_tokens:
            hyper = self.schedule.at(self.tokens / self.scale.batch_tokens)
            trainer.step(self._rows(self.scale.batch_tokens), hyper=hyper)
            self.tokens += self.scale.batch_tokens
            self._note_progress()

    # -- rounds ----------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        there = self._present(number)
        speeds = {i: self._speed(i) for i in there}
        share = {i: speed / sum(speeds.values()) for i, speed in speeds.items()}
        updates: list[tuple[float, Tensors]] = []
        tokens = 0
        for i in there:
            update, mine, steps = self._train(i, share[i], speeds[i])
            update = self._arrived(i, update)
            counts = {"tokens": float(mine), "steps": float(steps), "equal": 1.0}
            updates.append((counts[self.case.weights], update))
            tokens += mine
        if len(updates) > 1:
            self.agreement.append(_cosine(updates[0][1], updates[1][1]))
        if self.case.inner == "average":
            self._average_states(there)
        if self.case.momentum_follows_lr:
            self._anneal(self.tokens + tokens / 2)
        mean = weighted_mean(updates, restore_lengths=restores_lengths(self.config))
        assert mean is not None
        before = self.weights
        self.weights, self.outer = outer_step(self.config, before, mean, self.outer)
        self._note_step({n: before[n] - t for n, t in self.weights.items()})
        self.model.load_state_dict(self.weights)
        self.tokens += tokens

    def _anneal(self, middle: float) -> None:
        """Shorten the momentum as much as the rates are lower in this round, `middle` tokens into the run."""
        rate = self.schedule.at(middle / self.scale.batch_tokens).lr_multiplier
        ratio = min(1.0, rate / self._rate_before)
        self.outer = {n: t * ratio for n, t in self.outer.items()}
        self._rate_before = max(rate, 1e-9)

    def _average_states(self, there: list[int]) -> None:
        states = [self.states[i] for i in there]
        mean = copy.deepcopy(states[0])
        for key, own in mean["state"].items():
            for name, value in own.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    value.copy_(torch.stack([s["state"][key][name] for s in states]).mean(dim=0))
        self.states = {i: copy.deepcopy(mean) for i in range(self.case.clients)}

    def _present(self, number: int) -> list[int]:
        case = self.case
        for i in range(case.clients):
            if self.absent_until.get(i, 0) <= number and number % case.away_rounds == 0:
                away = self.rng.random() < case.away
                self.absent_until[i] = number + case.away_rounds if away else number
        there = [i for i in range(case.clients) if self.absent_until.get(i, 0) <= number]
        return there or [int(self.rng.integers(case.clients))]

    def _speed(self, i: int) -> float:
        return self.case.speeds[i % len(self.case.speeds)] if self.case.speeds else 1.0

    def _train(self, i: int, share: float, speed: float) -> tuple[Tensors, int, int]:
        """(pseudo-gradient, tokens, optimizer steps) of client i in this round."""
        scale, case = self.scale, self.case
        steps, batch = max(1, round(case.steps * speed)), scale.batch_tokens
        if case.batch == "federation":  # as many steps for each, of its share of the tokens
            rows = max(1, round(batch * share / scale.sequence_len))
            steps, batch = case.steps, rows * scale.sequence_len
        self.model.load_state_dict(self.weights)
        optimizer = plan.make_optimizer(self.config, self.model)
        if case.inner != "reset" and i in self.states:
            optimizer.load_state_dict(self.states[i])
        trainer, own = self._trainer(optimizer), 0
        for _ in range(steps):
            hyper = self.schedule.at((self.tokens + own / share) / scale.batch_tokens)
            trainer.step(self._rows(batch), hyper=hyper)
            own += batch
        self.states[i] = copy.deepcopy(optimizer.state_dict())
        local = self.model.state_dict()
        return {n: self.weights[n] - local[n].detach().clone() for n in self.weights}, own, steps

    def _arrived(self, i: int, update: Tensors) -> Tensors:
        """What the server decodes of client i's update, and of the rest of the one before."""
        parts = encode(update, wire=self.config.wire_up, rest=self.rests.get(i, {}).get)
        self.sent_bytes += sum(len(part.data) for part in parts)
        self.sent_values += sum(t.numel() for t in update.values())
        if self.config.wire_up in DECAY:
            self.rests[i] = update
        return decode(parts, shapes={name: t.shape for name, t in update.items()})

    # -- what both need --------------------------------------------------------------------------

    def _trainer(self, optimizer: MuonAdamW) -> Trainer:
        rows = max(1, self.scale.batch_tokens // self.scale.sequence_len)
        return Trainer(self.model, optimizer, device=_CPU, device_batch_rows=rows)

    def _rows(self, tokens: int) -> np.ndarray:
        """The next rows of the corpus in this seed's order, for any client."""
        count = tokens // self.scale.sequence_len
        places = (self.taken + np.arange(count)) % len(self.order)
        self.taken += count
        return self.corpus.rows[self.order[places]]

    def _note_progress(self) -> None:
        due = len(self.curve) * self.scale.total_tokens // _EVALUATIONS
        if (self.curve and self.tokens < due) or self.tokens >= self.scale.total_tokens:
            return
        self.curve.append((self.tokens, self._bpb(_CURVE_ROWS)))

    def _note_step(self, step: Tensors) -> None:
        self.norms.append(round(_dot(step, step) ** 0.5, 5))
        if self._step_before:
            self.cosines.append(_cosine(step, self._step_before))
        self._step_before = step

    def _bpb(self, rows: int | None = None) -> float:
        validation = self.corpus.validation[:rows]
        batches = np.array_split(validation, max(1, len(validation) // 64))
        return bits_per_byte(*bpb_sums(self.model, batches, self.corpus.token_bytes))


def _dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((t.double() * other[n].double()).sum()) for n, t in one.items())


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    size = (_dot(one, one) * _dot(other, other)) ** 0.5
    return round(_dot(one, other) / max(size, 1e-30), 4)
