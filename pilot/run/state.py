"""Everything that a run is between two rounds: what a snapshot keeps, and resuming reads back."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pilot import plan
from pilot.config import DEFAULTS, RunConfig, Scalar
from pilot.errors import PilotError
from pilot.rules.admission import AdmissionBooks
from pilot.rules.ledger import Ledger
from pilot.rules.merge_guard import GuardBooks
from pilot.run.snapshot import Snapshot
from pilot.segment import Segment
from pilot.wire.messages import Fence

FORMAT = 2

# What the model's tensors and the numbers of its rows are made of: another value fits no snapshot.
_FIXED_KEYS = frozenset(
    [
        "depth",
        "arch",
        "vocab-size",
        "sequence-len",
        "source",
        "num-shards",
        "epochs",
        "tokenizer",
        "packing",
    ]
)
# Defaults of before, and what was before there was a key: a run that was begun with these continues with them.
_OLD_DEFAULTS: Mapping[str, Scalar] = {
    "outer-lr": 0.7,
    "outer-momentum": 0.9,
    "batch-of": "client",
}
_LAST_ROUNDS = 3  # whose lengths show how long the next may be
_RENAMED = {"wire-dtype": "wire-up"}  # keys of older snapshots
_LENGTH_KEYS = ("total-tokens", "target-param-data-ratio", "total-batch-size")


class ResumeError(PilotError):
    """The run on disk is not the run that was asked for."""


@dataclass(frozen=True)
class MergedReply:
    """A reply that the model has absorbed, with the rows that it consumed."""

    client: str
    fence: Fence
    tokens: int
    consumed: list[Segment]

    def to_json(self) -> dict[str, Any]:
        """As snapshots and events keep it: a segment is [epoch, shard, first row, end row]."""
        consumed = [segment.to_list() for segment in self.consumed]
        return asdict(self) | {"consumed": consumed}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "MergedReply":
        consumed = [Segment.from_list(segment) for segment in values["consumed"]]
        return MergedReply(values["client"], Fence(**values["fence"]), values["tokens"], consumed)

    def line(self) -> str:
        """Its line of merged.jsonl."""
        fence = self.fence
        values = {
            "round": fence.round_number,
            "term": fence.term,
            "lease": fence.lease_id,
            "client": self.client,
            "tokens": self.tokens,
            "consumed": [segment.to_list() for segment in self.consumed],
        }
        return json.dumps(values, separators=(",", ":"))


@dataclass(frozen=True)
class Contribution:
    """A reply on its way into the model: what else the books learn from it besides the reply itself.

    `row_counts` are the sizes of shards that its client has packed, `norm` the L2 norm of its update, `steps`
    its optimizer steps, in fractions too.
    """

    reply: MergedReply
    row_counts: Mapping[int, int]
    norm: float
    steps: float


@dataclass(frozen=True)
class ConfigChange:
    """A key that was changed with `resume-anyway`; it holds for the rounds after `round_number`."""

    round_number: int
    key: str
    was: Scalar | None
    now: Scalar


@dataclass
class RoundRecord:
    """One line of the run's table. `val_bpb` is that of the model merged in this round."""

    round_number: int
    reason: str
    clients: int
    tokens: int
    duration_s: float
    train_loss: float | None
    val_bpb: float | None = None
    eval_rows: int = 0
    refused: int = 0  # replies whose content was
    taken_back: bool = False  # what it merged


@dataclass
class RunState:
    """The model and the books after `round_number` rounds: all that one round hands to the next."""

    config: RunConfig
    weights: dict[str, Tensor]
    ledger: Ledger
    total_tokens: int
    outer: Mapping[str, Tensor] = field(default_factory=dict)  # a file, once there is a snapshot
    round_number: int = 0
    tokens: int = 0  # committed
    merged: list[MergedReply] = field(default_factory=list)  # in the last round
    merged_log: list[str] = field(default_factory=list)  # in all rounds: lines of merged.jsonl
    last_merged: dict[str, Fence] = field(default_factory=dict)  # client → of its last merged reply
    history: list[RoundRecord] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    wandb_id: str | None = None
    config_changes: list[ConfigChange] = field(default_factory=list)
    admission: AdmissionBooks = field(default_factory=AdmissionBooks)
    guard: GuardBooks = field(default_factory=GuardBooks)
    movement: plan.Movement | None = None  # how far steps can move the model; None: not known

    @property
    def finished(self) -> bool:
        """The tokens are reached, the rounds are over, or every row is committed."""
        if self.tokens >= self.total_tokens or self.ledger.exhausted:
            return True
        return 0 < self.config.num_rounds <= self.round_number

    @property
    def steps(self) -> int:
        """Optimizer steps of the federation, as checkpoints count them."""
        return self.tokens // self.config.total_batch_size

    @property
    def last_lengths_s(self) -> list[float]:
        """What the last rounds lasted in which clients took part: how long the next one may be."""
        lengths_s = [record.duration_s for record in self.history if record.clients]
        return lengths_s[-_LAST_ROUNDS:]

    def record(self, round_number: int) -> RoundRecord | None:
        return next((r for r in self.history if r.round_number == round_number), None)

    def absorb(
        self,
        record: RoundRecord,
        contributions: Sequence[Contribution],
        model: tuple[dict[str, Tensor], Mapping[str, Tensor]] | None,
    ) -> None:
        """Take in what a round did: its rows are committed, its model (weights, outer state) replaces ours.

        `contributions` in the order in which they were folded; `model` None: nothing was merged. Raises
        LedgerError where the books cannot take a contribution.
        """
        if model is not None:
            self.weights, self.outer = model
        for one in contributions:
            lease_id = one.reply.fence.lease_id
            self.ledger.commit(lease_id, one.reply.consumed, one.row_counts)
        self.merged = [one.reply for one in contributions]
        self.merged_log += [reply.line() for reply in self.merged]
        self.last_merged |= {reply.client: reply.fence for reply in self.merged}
        self.admission.merged(
            [one.norm for one in contributions], [one.steps for one in contributions]
        )
        self.guard.merged({reply.client for reply in self.merged})
        self.tokens += record.tokens
        self.round_number = record.round_number
        self.history.append(record)

    def take_back(self, before: "RunState", record: RoundRecord, *, term: int) -> None:
        """Be what `before` was, an earlier state of this run, in a round of its own.

        All that was merged since is undone, and its rows are free again.
        """
        first, last = before.round_number + 1, self.round_number
        self.weights, self.outer = before.weights, before.outer
        before.ledger.keep_lease_ids_of(self.ledger)
        self.ledger, self.tokens = before.ledger, before.tokens
        self.last_merged, self.merged = before.last_merged, []
        self.admission.norms, self.admission.steps = before.admission.norms, before.admission.steps
        for one in self.history:
            one.taken_back = one.taken_back or first <= one.round_number <= last
        line = {"round": record.round_number, "term": term, "takes_back": [first, last]}
        self.merged_log.append(json.dumps(line, separators=(",", ":")))
        self.round_number = record.round_number
        self.history.append(record)

    def to_snapshot(self, *, term: int) -> Snapshot:
        state: dict[str, Any] = {
            "format": FORMAT,
            "run": self.config.run_name,
            "term": term,
            "round": self.round_number,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "merged": [reply.to_json() for reply in self.merged],
            "last_merged": {
                client: [fence.term, fence.round_number, fence.lease_id]
                for client, fence in self.last_merged.items()
            },
            "history": [dict(vars(record)) for record in self.history],
            "fingerprints": self.fingerprints,
            "wandb_id": self.wandb_id,
            "config": self.config.to_mapping(),
            "config_changes": [asdict(change) for change in self.config_changes],
            "admission": asdict(self.admission),
            "guard": self.guard.to_json(),
            "schedule": self._schedule_position(),
            "versions": versions(),
            "ledger": self.ledger.to_state(),
        }
        return Snapshot(self.round_number, self.weights, self.outer, state, self.merged_log)

    def _schedule_position(self) -> dict[str, float]:
        """Where the next round starts in the schedule, for people; resuming counts tokens instead."""
        step = self.tokens / self.config.total_batch_size
        schedule = plan.schedule(self.config, total_tokens=self.total_tokens)
        return {"step": step, "total_steps": schedule.total_steps} | asdict(schedule.at(step))

    @staticmethod
    def from_snapshot(
        snapshot: Snapshot,
        config: RunConfig,
        *,
        shard_order: Callable[[int], Sequence[int]],
    ) -> "RunState":
        """The run's state. Its `config` is the one to continue with: that given, with the run's own values
        for defaults that were others when it began.

        Raises ResumeError if `config` would train another model, naming the keys that differ.

        With `resume-anyway` the new values hold from here on, and `config_changes` lists them; the keys
        that the model's tensors or the ledger's rows depend on can't be changed even so.
        """
        state = snapshot.state
        if state["format"] != FORMAT:
            raise ResumeError(
                f"run {config.run_name} was written by another version of pilot (format "
                f"{state['format']}, not {FORMAT}): resume it with that version"
            )
        if not config.resume_anyway:
            config = _keeping_its_values(state["config"], config)
        changes = _changes(state["config"], config, after=state["round"])
        resumed = RunState(
            config=config,
            weights=snapshot.model,
            outer=snapshot.outer,
            ledger=Ledger.from_state(state["ledger"], shard_order=shard_order),
            total_tokens=state["total_tokens"],
            round_number=state["round"],
            tokens=state["tokens"],
            merged=[MergedReply.from_json(reply) for reply in state["merged"]],
            merged_log=list(snapshot.merged),
            last_merged={
                client: Fence(config.run_name, *numbers)
                for client, numbers in state["last_merged"].items()
            },
            history=[RoundRecord(**record) for record in state["history"]],
            fingerprints=state["fingerprints"],
            wandb_id=state["wandb_id"],
            config_changes=[ConfigChange(**change) for change in state["config_changes"]],
            admission=AdmissionBooks(**state["admission"]),
            guard=GuardBooks.from_json(state.get("guard"), round_number=state["round"]),
        )
        if changes:
            resumed._change(changes)
        return resumed

    def _change(self, changes: list[ConfigChange]) -> None:
        """Drop what means nothing under another configuration."""
        self.config_changes += changes
        self.admission.norms, self.admission.steps = [], []
        keys = {change.key for change in changes}
        if "outer-optimizer" in keys:  # momenta of another optimizer mean something else
            self.outer = {}
        if keys & set(_LENGTH_KEYS):
            self.total_tokens = plan.total_tokens(self.config)


@cache
def versions() -> dict[str, str]:
    """What a snapshot was written with."""
    return {
        "pilot": version("pilot"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": version("flwr"),
    }


def _keeping_its_values(before: Mapping[str, Scalar], config: RunConfig) -> RunConfig:
    """`config`, but with the values of a run that was begun with the defaults of before."""
    asked = config.to_mapping()
    kept = {
        key: old
        for key, old in _OLD_DEFAULTS.items()
        if asked[key] == DEFAULTS[key] != old and before.get(key, old) == old
    }
    return RunConfig.from_mapping(asked | kept) if kept else config


def _changes(before: dict[str, Scalar], config: RunConfig, *, after: int) -> list[ConfigChange]:
    """The keys in which `config` would train another model than the run's was; raises ResumeError unless
    they may be changed and the user wants that."""
    before = {_RENAMED.get(key, key): value for key, value in before.items()}
    changes = [
        ConfigChange(after, key, before.get(key, _OLD_DEFAULTS.get(key)), value)
        for key, value in config.training_keys().items()
        if before.get(key, _OLD_DEFAULTS.get(key, DEFAULTS[key]))
        != value  # unknown then: by default
    ]
    refused = [c for c in changes if c.key in _FIXED_KEYS] if config.resume_anyway else changes
    if refused:
        differing = ", ".join(f"{c.key} (was {c.was!r}, is {c.now!r})" for c in refused)
        remedy = "use the old values to resume it, or another run-name"
        if not any(change.key in _FIXED_KEYS for change in refused):
            remedy += "; resume-anyway=true continues with the new ones"
        raise ResumeError(
            f"run {config.run_name} was started with another configuration: {differing}; {remedy}"
        )
    return changes
