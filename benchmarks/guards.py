"""How often the rules of admission and the guard of merges are wrong, and what they notice.

python -m benchmarks.guards --rounds 1000
python -m benchmarks.guards --rounds 0 --attacks flip9 optimizer

Small federations train for real, in one process, with the federation's own rules, optimizers and outer step
on the built-in corpus; only messages and clocks are left out. In honest runs every refusal and every merge
that is taken back is a false alarm; clients take different numbers of steps, and now and then lose the state
of their optimizer. With `--attacks` one client of two, three or five is wrong from a round on: its update is

    x1e6            a million times too large
    flip, 3, 9      turned round; and three or nine times too long (flip3, flip9)
    noise, noise9   random numbers, as long as an update is or nine times as long
    optimizer       that of an optimizer whose learning rates are thirty times too high
    shuffled        trained on rows whose tokens are in a random order

One line of JSON per run, and a last one: the number of honest runs and their false alarms; the extremes of what
honest clients showed of each quantity that a rule looks at; and by attack, after how many rounds it was
noticed, by which rule, and what the model was worth at the end: bpb, beside that of the honest run, and of one
in which all rules are off.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.chaos.micro import MICRO
from nanochat.common import ArgumentParser, run_command_line
from nanochat.trainer import Trainer
from pilot import plan
from pilot.config import RunConfig
from pilot.rules.admission import (
    MIN_NORMS,
    AdmissionBooks,
    movement_refusal,
    norm_refusal,
    update_norm,
)
from pilot.rules.aggregation import weighted_mean
from pilot.rules.agreement import Votes, outliers
from pilot.rules.merge_guard import GuardBooks, Verdict
from pilot.rules.outer import outer_step, restores_lengths
from pilot.rules.validation import Figure, figure, slices
from pilot.segment import Score
from pilot.site.data import open_data

ATTACKS = ("x1e6", "flip9", "flip3", "flip", "noise", "noise9", "optimizer", "shuffled")
_COOLING_ROUNDS = 8
_CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One federation. `steps` a client takes in a round, of which one is drawn; `lost`: the share of rounds in
    which a client starts with a fresh optimizer."""

    clients: int
    steps: tuple[int, ...]
    lost: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


_BATCH: dict[str, Any] = {"total-batch-size": 512}
CASES = (
    Case(3, (1, 2, 4), 0.05, _BATCH | {"lr": 0.1}),
    Case(2, (2,), 0.05, _BATCH | {"lr": 0.1, "outer-lr": 0.7, "outer-momentum": 0.9}),
    Case(5, (1, 8), 0.05, {"total-batch-size": 256, "lr": 0.1}),
    Case(3, (4,), 0.0, _BATCH | {"lr": 0.2, "outer-lr": 0.7, "outer-momentum": 0.9}),
    Case(4, (1,), 0.05, _BATCH | {"lr": 0.02, "outer-optimizer": "fedavg", "outer-lr": 1.0}),
    Case(3, (2,), 1.0, _BATCH | {"lr": 0.1, "arch": "modern"}),
    Case(
        3,
        (2, 16),
        0.05,
        {"total-batch-size": 256, "lr": 0.05, "outer-lr": 0.7, "outer-momentum": 0.9},
    ),
    Case(2, (1, 6), 0.05, _BATCH | {"lr": 0.1, "weight-decay": 0.002}),
)


def main() -> None:
    parser = ArgumentParser(prog="benchmarks.guards", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000, help="honest rounds in all")
    parser.add_argument("--rounds-per-run", type=int, default=40)
    parser.add_argument(
        "--attacks", nargs="*", choices=ATTACKS, help="ways of being wrong; without a name: all"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    length = arguments.rounds_per_run
    honest = []
    for number in range(-(-arguments.rounds // length)):
        case = CASES[number % len(CASES)]
        honest.append(Federation(case, length, arguments.seed + number).play())
        print(json.dumps({"honest": honest[-1]}), flush=True)
    attacked = []
    attacks = ATTACKS if arguments.attacks == [] else arguments.attacks or ()
    for run in _attacks(attacks, length, arguments.seed):
        attacked.append(run)
        print(json.dumps(run), flush=True)
    print(json.dumps({"honest": _false_alarms(honest), "attacks": _noticed(attacked)}))


def _attacks(attacks: Sequence[str], length: int, seed: int) -> Iterator[dict[str, Any]]:
    config = _BATCH | {"lr": 0.1}
    for clients in (2, 3, 5) if attacks else ():
        case = Case(clients, (2,), 0.0, config)
        honest = Federation(case, length, seed).play()["bpb"]
        for attack in attacks:
            for since in (1, length // 3):
                about = {"attack": attack, "clients": clients, "since": since, "honest_bpb": honest}
                guarded = Federation(case, length, seed, attack=attack, since=since).play()
                open_case = Case(clients, (2,), 0.0, config | _OFF)
                open_ = Federation(open_case, length, seed, attack=attack, since=since).play()
                yield about | guarded | {"unguarded_bpb": open_["bpb"]}


_OFF: dict[str, Any] = {
    "max-update-norm-ratio": 0.0,
    "min-update-cosine": -1.0,
    "take-back-ratio": 0.0,
}


class Federation:
    """Clients that train in turn, and a server's rules over what they give; the first one may be wrong."""

    def __init__(
        self, case: Case, rounds: int, seed: int, *, attack: str = "", since: int = 0
    ) -> None:
        self.case, self.rounds, self.rng = case, rounds, Random(seed)
        self.attack, self.since = attack, since
        batch = int(case.config["total-batch-size"])
        total = int(rounds * case.clients * statistics.mean(case.steps)) * batch
        values = {"run-name": "guards", "seed": seed, "total-tokens": total, "eval-rows": 32}
        self.config = RunConfig.from_mapping(MICRO | values | case.config)
        self.rows, self.validation, self.token_bytes = _data(self.config, case.clients)
        self.schedule = plan.schedule(self.config, total_tokens=total)
        self.movement = plan.Movement.of(self.config)
        self.model = plan.build_model(self.config, device=_CPU, compute_dtype=torch.float32)
        self.weights: Tensors = plan.initial_weights(self.config)
        self.outer: Tensors = {}
        self.trusted = (self.weights, self.outer)
        self.admission, self.guard = AdmissionBooks(), GuardBooks()
        self.states: dict[int, Any] = {}
        self.position = [0] * case.clients
        self.tokens = 0
        self.cooling: dict[int, int] = {}  # client → first round in which it works again
        self.refused: list[tuple[int, int, str]] = []  # round, client, rule
        self.taken_back: list[int] = []
        self.seen: dict[str, list[float]] = {}

    def play(self) -> dict[str, Any]:
        for number in range(1, self.rounds + 1):
            if not self._score(number):
                self._round(number)
        self._score(self.rounds + 1)
        value = self._figure().bpb
        extremes = {n: [round(min(v), 4), round(max(v), 4)] for n, v in self.seen.items()}
        return {
            "case": str(self.case),
            "bpb": round(value or math.nan, 4),
            "refused": self.refused,
            "taken_back": self.taken_back,
            "extremes": extremes,
        }

    # -- one round -------------------------------------------------------------------------------

    def _score(self, number: int) -> bool:
        """What is known of the last merge; whether it is taken back."""
        ratio, found = self.config.take_back_ratio, self._figure()
        for scores in found.by_client.values():
            worse = self.guard._ratio(scores)
            if self.guard.since and worse is not None:
                self._note("bpb_over_best_of_last", worse)
        verdict = self.guard.judge(found, wanted_rows=self.config.eval_rows, max_ratio=ratio)
        if verdict is Verdict.BAD:
            self.taken_back.append(number)
            self.weights, self.outer = self.trusted
            if culprit := self.guard.was_bad(number):
                self.cooling[int(culprit)] = number + _COOLING_ROUNDS
            return True
        self.guard.was_good(number - 1, found)
        self.trusted = (self.weights, self.outer)
        return False

    def _figure(self) -> Figure:
        """All clients are right about what they see: this is about updates."""
        self.model.load_state_dict(self.weights)
        ids = torch.from_numpy(self.validation.astype(np.int64))
        with torch.inference_mode():
            loss = self.model(ids[:, :-1], ids[:, 1:], loss_reduction="none").reshape(len(ids), -1)
        num_bytes = self.token_bytes[ids[:, 1:]]
        nats = (loss.double() * (num_bytes > 0)).sum(1).clamp(max=1e9).nan_to_num(1e9)
        names = [str(i) for i in range(self.case.clients)]
        asked = dict(zip(names, slices(len(ids), len(names)), strict=True))
        said = {
            name: [
                Score(f, e, float(nats[f:e].sum()), int(num_bytes[f:e].sum()))
                for f, e in one.pieces
            ]
            for name, one in asked.items()
        }
        return figure(asked, said)

    def _round(self, number: int) -> None:
        there = [i for i in range(self.case.clients) if self.cooling.get(i, 0) <= number]
        working = [i for i in there if str(i) not in self.guard.aside] or there
        updates: dict[int, tuple[Tensors, int]] = {}
        for i in working:
            update, steps = self._train(
                i, wrong=bool(self.attack) and i == 0 and number >= self.since
            )
            if rule := self._refusal(update, steps):
                self.refused.append((number, i, rule))
            else:
                updates[i] = (update, steps)
        for name, why in self._outliers(updates).items():
            rule = "others' norms" if "its norm" in why else "direction"
            self.refused.append((number, int(name), rule))
            del updates[int(name)]
        if updates:
            batch = self.config.total_batch_size
            mean = weighted_mean(
                ((float(steps * batch), u) for u, steps in updates.values()),
                restore_lengths=restores_lengths(self.config),
            )
            assert mean is not None
            self.weights, self.outer = outer_step(self.config, self.weights, mean, self.outer)
        self.tokens += sum(steps for _, steps in updates.values()) * self.config.total_batch_size
        self.admission.merged(
            [update_norm(update) for update, _ in updates.values()],
            [float(steps) for _, steps in updates.values()],
        )
        self.guard.merged([str(i) for i in updates])

    def _train(self, i: int, *, wrong: bool) -> tuple[Tensors, int]:
        steps, config = self.rng.choice(self.case.steps), self.config
        self.model.load_state_dict(self.weights)
        attack = self.attack if wrong else ""
        optimizer = plan.make_optimizer(config, self.model)
        if i in self.states and self.rng.random() >= self.case.lost:
            optimizer.load_state_dict(self.states[i])
        if attack == "optimizer":
            for group in optimizer.param_groups:
                group["initial_lr"] *= 30
        trainer = Trainer(self.model, optimizer, device=_CPU, device_batch_rows=config.batch_rows)
        for step in range(steps):
            own = step * self.case.clients
            hyper = self.schedule.at(self.tokens / config.total_batch_size + own)
            trainer.step(self._rows(i, shuffled=attack == "shuffled"), hyper=hyper)
        self.states[i] = optimizer.state_dict()
        update = {n: self.weights[n] - t.detach() for n, t in self.model.state_dict().items()}
        return self._spoilt(update, attack), steps

    def _rows(self, i: int, *, shuffled: bool) -> np.ndarray:
        rows, count = self.rows[i], self.config.batch_rows
        taken = rows[[(self.position[i] + k) % len(rows) for k in range(count)]]
        self.position[i] += count
        return (
            np.random.default_rng(self.position[i]).permuted(taken, axis=1) if shuffled else taken
        )

    def _spoilt(self, update: Tensors, attack: str) -> Tensors:
        factors = {"x1e6": 1e6, "flip9": -9.0, "flip3": -3.0, "flip": -1.0}
        if attack in factors:
            return {name: factors[attack] * tensor for name, tensor in update.items()}
        if attack.startswith("noise"):
            generator = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
            noise = {n: torch.randn(t.shape, generator=generator) for n, t in update.items()}
            scale = (9.0 if attack == "noise9" else 1.0) * update_norm(update) / update_norm(noise)
            return {name: scale * tensor for name, tensor in noise.items()}
        return update

    # -- rules -----------------------------------------------------------------------------------

    def _refusal(self, update: Tensors, steps: int) -> str:
        ratio = self.config.max_update_norm_ratio
        if ratio == 0:
            return ""
        norm, books = update_norm(update), self.admission
        limit = self.movement.limit(self.weights, steps=steps)
        self._note("norm_over_movement_limit", norm / limit)
        if len(books.norms) >= MIN_NORMS:
            usual = statistics.median(books.norms) * books.longer(steps)
            self._note("norm_over_earlier", norm / usual)
        if movement_refusal(norm, limit, steps=steps):
            return "movement"
        if norm_refusal(norm, books.norms, max_ratio=ratio, longer=books.longer(steps)):
            return "earlier norms"
        return ""

    def _outliers(self, updates: Mapping[int, tuple[Tensors, int]]) -> dict[str, str]:
        if not updates:
            return {}
        flat = [
            torch.cat([t.reshape(-1) for t in u.values()]).double() for u, _ in updates.values()
        ]
        gram = [[float(a @ b) for b in flat] for a in flat]
        momentum = [self.outer.get(f"momentum.{name}") for name in self.weights]
        heading = None
        if self.guard.improving and all(one is not None for one in momentum):
            along = torch.cat([one.reshape(-1) for one in momentum if one is not None]).double()
            heading = [float(f @ along / (f.norm() * along.norm()).clamp_min(1e-30)) for f in flat]
            for cosine in heading:
                self._note("cosine_with_momentum", cosine)
        names, steps = [str(i) for i in updates], [float(s) for _, s in updates.values()]
        votes = Votes(names, steps, gram, heading)
        everybody = range(len(names))
        if len(names) > 1:
            self._note_all("cosine_with_others", votes.cosines(everybody))
        if len(names) > 2:
            self._note_all("norm_over_others", votes.norms_over(everybody))
            aims = votes.aims(everybody)
            self._note_all("cosine_over_that_of_the_others", aims[~np.isnan(aims)])
        config = self.config
        norms = config.max_update_norm_ratio > 0
        return outliers(votes, min_cosine=config.min_update_cosine, norms=norms)

    def _note_all(self, name: str, values: Iterable[float]) -> None:
        for value in values:
            self._note(name, float(value))

    def _note(self, name: str, value: float) -> None:
        self.seen.setdefault(name, []).append(value)


# -- data and results ------------------------------------------------------------------------------


def _data(config: RunConfig, clients: int) -> tuple[list[np.ndarray], np.ndarray, Tensor]:
    """(rows of each client, validation rows, bytes of each token)."""
    data = open_data(config)
    rows = []
    for shard in data.train_shards:
        count = data.rows.wait_packed(shard) or 0
        rows.append(np.array(data.rows.rows(shard).read(0, count)))
    validation = np.array(data.validation_rows(0, config.eval_rows))
    token_bytes = torch.tensor(data.tokenizer.token_bytes())
    data.rows.close()
    return np.array_split(np.concatenate(rows), clients), validation, token_bytes


def _false_alarms(runs: list[dict[str, Any]]) -> dict[str, Any]:
    extremes: dict[str, list[float]] = {}
    for run in runs:
        for name, (low, high) in run["extremes"].items():
            both = extremes.setdefault(name, [low, high])
            extremes[name] = [min(both[0], low), max(both[1], high)]
    return {
        "runs": len(runs),
        "refused": dict(Counter(rule for run in runs for _, _, rule in run["refused"])),
        "taken_back": sum(len(run["taken_back"]) for run in runs),
        "extremes": extremes,
    }


def _noticed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for run in runs:
        rounds = [n for n, i, _ in run["refused"] if i == 0] + run["taken_back"]
        name = f"{run['attack']}, one of {run['clients']}, from round {run['since']}"
        result[name] = {
            "noticed_after": min(rounds) - run["since"] if rounds else None,
            "by": sorted({rule for _, i, rule in run["refused"] if i == 0})
            + ["taken back"] * bool(run["taken_back"]),
            "honest_refused": sum(i != 0 for _, i, _ in run["refused"]),
            "bpb": run["bpb"],
            "honest_bpb": run["honest_bpb"],
            "unguarded_bpb": run["unguarded_bpb"],
        }
    return result


if __name__ == "__main__":
    run_command_line(main)
