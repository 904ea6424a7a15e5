"""One federation from its first round to its last, deterministic, in one process.

The real Trainer, optimizers, schedule, weighted mean and outer step; clients take turns. Left out are messages,
clocks, and rules of admission. Plain training is the case without clients: the same steps on the same rows in
the same order, without rounds.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.case import Case, Outcome, Scale
from benchmarks.quality.text import Corpus, corpus
from nanochat.loss_eval import bits_per_byte, bpb_sums
from nanochat.optim import MuonAdamW
from nanochat.trainer import Trainer
from pilot import plan
from pilot.config import RunConfig
from pilot.rules.aggregation import weighted_mean
from pilot.rules.batch import step_shares
from pilot.rules.outer import outer_step, restores_lengths
from pilot.wire.codec import DECAY, decode, encode
from pilot.wire.steps import FULL, encode_step

_CPU = torch.device("cpu")
# Of a run, besides the last, and on how many validation rows: 16 on all of them took a third of its time.
_EVALUATIONS, _CURVE_ROWS = 8, 128
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Reply:
    """A client's update of `tokens`, made of the rows at `places`, and what it counts in a mean; `before`: the
    state of its optimizer, and the rest of its updates, with which it began."""

    client: int
    weight: float
    update: Tensors
    tokens: int
    places: list[int]
    before: tuple[Any, Tensors]


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
        # of who is away; of whose reply is late
        self.rng, self.late_rng = (np.random.default_rng([seed, n]) for n in (1, 3))
        self.order = np.random.default_rng([seed, 2]).permutation(len(corpus.rows))
        self.model = plan.build_model(self.config, device=_CPU, compute_dtype=torch.float32)
        self.weights: Tensors = plan.initial_weights(self.config)
        self.model.load_state_dict(self.weights)
        self.schedule = plan.schedule(self.config, total_tokens=scale.total_tokens)
        self.states: dict[int, Any] = {}
        self.outer: Tensors = {}
        self.tokens = self.refused = self.taken = 0
        self.curve: list[tuple[int, float]] = []
        self.absent_until: dict[int, int] = {}
        self.last_round: dict[int, int] = {}  # in which a client was there
        self.norms: list[float] = []
        self.cosines: list[float] = []
        self.agreement: list[float] = []
        self.rests: dict[int, Tensors] = {}
        self.sent_bytes = self.sent_values = 0
        self._free: list[int] = []  # places in the order of rows that were given back
        self._held: list[_Reply] = []  # replies that the next merge is to have
        self.residual: Tensors = {}  # of what the outer step wants and clients were not sent
        self.down_bytes = self.down_values = 0
        self._step_before: Tensors = {}
        self._rate_before = 1.0

    def run(self) -> Outcome:
        began_s, rounds = time.monotonic(), 0
        if self.case.clients:
            while self.tokens < self.scale.total_tokens:
                self._round(rounds)
                rounds += 1
                self._note_progress()
            self._end()
        else:
            self._plain()
        seconds = time.monotonic() - began_s
        bpb = self._bpb()
        self.curve.append((self.tokens, bpb))
        sent = round(self.sent_bytes / max(1, self.sent_values), 4)
        received = round(self.down_bytes / max(1, self.down_values), 4)
        figures = (self.norms, self.cosines, self.agreement, sent, received, self.refused)
        return Outcome(bpb, self.curve, rounds, seconds, *figures)

    # -- plain -----------------------------------------------------------------------------------

    def _plain(self) -> None:
        trainer = self._trainer(plan.make_optimizer(self.config, self.model))
        while self.tokens < self.scale.total_tokens:
            hyper = self.schedule.at(self.tokens / self.scale.batch_tokens)
            rows = self.scale.batch_tokens // self.scale.sequence_len
            trainer.step(self._rows(self._places(rows)), hyper=hyper)
            self.tokens += self.scale.batch_tokens
            self._note_progress()

    # -- rounds ----------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        there = self._present(number)
        work = self._work(there)
        planned = sum(steps * rows for steps, rows in work.values())
        replies = [self._reply(i, number, *work[i], planned) for i in there]
        if len(replies) > 1:
            self.agreement.append(_cosine(replies[0].update, replies[1].update))
        if self.case.inner == "average":
            self._average_states(there)
        if self.case.momentum_follows_lr:
            self._anneal(self.tokens + planned * self.scale.sequence_len / 2)
        if self.case.delayed is None:
            held, self._held = self._held, []
            on_time = [reply for reply in replies if not self._is_late(reply)]
            self.tokens += sum(reply.tokens for reply in (*held, *on_time))
            self._merge([*held, *on_time])
        else:
            self.tokens += sum(
                reply.tokens for reply in replies
            )  # whose clients train on from here
            held, self._held = self._held, replies
            self._merge(held)

    def _end(self) -> None:
        """What is still held when the run has its tokens: a merge that is only delayed, or late replies."""
        if self.case.delayed is not None:
            self._merge(self._held)
        else:
            self.refused += sum(reply.tokens for reply in self._held)

    def _is_late(self, reply: _Reply) -> bool:
        """Whether it missed the merge of its round: it waits for the next one, or is as if it had not been."""
        if not self.case.late or self.late_rng.random() >= self.case.late:
            return False
        if self.case.late_weight:
            weight = reply.weight * self.case.late_weight
            self._held.append(dataclasses.replace(reply, weight=weight))
            return True
        self.refused += reply.tokens
        self._free = reply.places + self._free
        self.states[reply.client], self.rests[reply.client] = reply.before
        return True

    def _merge(self, replies: list[_Reply]) -> None:
        updates = [(reply.weight, reply.update) for reply in replies]
        mean = weighted_mean(updates, restore_lengths=restores_lengths(self.config))
        if mean is None:
            return
        before = self.weights
        wanted, self.outer = outer_step(self.config, before, mean, self.outer)
        self.weights = self._received(before, wanted)
        self._note_step({n: before[n] - t for n, t in self.weights.items()})
        self.model.load_state_dict(self.weights)

    def _received(self, before: Tensors, wanted: Tensors) -> Tensors:
        """The model that clients hold when the outer step wants another; the last one is sent to nobody."""
        wire, values = self.config.wire_down, sum(t.numel() for t in wanted.values())
        if self.tokens >= self.scale.total_tokens:
            residual, self.residual = self.residual, {}
            return {n: t + residual[n] if n in residual else t for n, t in wanted.items()}
        self.down_values += values
        if wire == FULL:
            self.down_bytes += 4 * values
            return wanted
        weights, self.residual, parts = encode_step(before, wanted, self.residual.get, wire=wire)
        self.down_bytes += sum(len(part.data) for part in parts)
        return weights

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
        case, done = self.case, self.tokens / self.scale.total_tokens
        if done < case.alone:
            return [0]
        if case.trace:
            at = number // case.away_rounds if case.away_rounds else int(done * len(case.trace))
            return list(case.trace[at % len(case.trace)])
        for i in range(case.clients):
            if self.absent_until.get(i, 0) <= number and number % case.away_rounds == 0:
                away = self.rng.random() < case.away
                self.absent_until[i] = number + case.away_rounds if away else number
        there = [i for i in range(case.clients) if self.absent_until.get(i, 0) <= number]
        return there or [int(self.rng.integers(case.clients))]

    def _work(self, there: list[int]) -> dict[int, tuple[int, int]]:
        """(optimizer steps, rows of each) of the clients of a round; the last round is as long as the run."""
        scale, case = self.scale, self.case
        speeds = {i: case.speeds[i % len(case.speeds)] if case.speeds else 1.0 for i in there}
        rows = max(1, round(scale.batch_tokens * case.batch_factor) // scale.sequence_len)
        shares = dict.fromkeys(there, rows)
        if case.batch == "federation":
            by_speed = speeds if case.shares == "speed" else dict.fromkeys(there, 1.0)
            shares = step_shares(rows, dict.fromkeys(there, 1), by_speed)
            speeds = {i: speed / by_speed[i] for i, speed in speeds.items()}
        steps = case.steps_at(self.tokens / scale.total_tokens)
        taken = {i: max(1, round(steps * speed)) for i, speed in speeds.items()}
        planned = sum(taken[i] * shares[i] for i in there) * scale.sequence_len
        longest = min(1.0, (scale.total_tokens - self.tokens) / planned)
        return {i: (math.ceil(taken[i] * longest), shares[i]) for i in there}

    def _reply(self, i: int, number: int, steps: int, rows: int, planned: int) -> _Reply:
        """What client i makes of `steps` steps of `rows`, of the `planned` rows of all in this round."""
        scale, case = self.scale, self.case
        before, tokens = (self.states.get(i), self.rests.get(i, {})), 0
        away = number - self.last_round.get(i, number)
        self.last_round[i] = number
        start = self._start(i)
        self.model.load_state_dict(start)
        optimizer = plan.make_optimizer(self.config, self.model)
        betas = [group.get("betas") for group in optimizer.param_groups]
        if before[0] and case.inner != "reset" and not (case.inner == "recent" and away > 1):
            optimizer.load_state_dict(before[0])
        if case.batch == "federation":
            plan.take_share(
                optimizer, betas, min(1.0, rows * scale.sequence_len / scale.batch_tokens)
            )
        trainer, share, places = self._trainer(optimizer), steps * rows / planned, []
        for _ in range(steps):
            hyper = self.schedule.at((self.tokens + tokens / share) / scale.batch_tokens)
            places.append(self._places(rows))
            trainer.step(self._rows(places[-1]), hyper=hyper)
            tokens += rows * scale.sequence_len
        self.states[i] = copy.deepcopy(optimizer.state_dict())
        local = self.model.state_dict()
        update = {n: start[n] - local[n].detach().clone() for n in start}
        counts = {"tokens": tokens, "tokens2/steps": tokens**2 / steps, "steps": steps, "equal": 1}
        weight, used = float(counts[case.weights]), [place for step in places for place in step]
        return _Reply(i, weight, self._arrived(i, update), tokens, used, before)

    def _start(self, i: int) -> Tensors:
        """The weights from which client i begins: the model's, ahead by a part of its own update on the way."""
        own = next((reply.update for reply in self._held if reply.client == i), None)
        if not self.case.delayed or own is None:
            return self.weights
        return {n: t - self.case.delayed * own[n] for n, t in self.weights.items()}

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

    def _places(self, count: int) -> list[int]:
        """The next places in this seed's order of rows, for any client; those given back come first."""
        places, self._free = self._free[:count], self._free[count:]
        first, self.taken = self.taken, self.taken + count - len(places)
        return places + [place % len(self.order) for place in range(first, self.taken)]

    def _rows(self, places: list[int]) -> np.ndarray:
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
