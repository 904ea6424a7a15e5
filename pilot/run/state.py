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
from pilot.config import RunConfig
from pilot.rules.admission import AdmissionBooks
from pilot.rules.ledger import Ledger
from pilot.rules.merge_guard import GuardBooks
from pilot.rules.outer import RESIDUAL, Coded
from pilot.run.changes import ConfigChange, ResumeError, changes_of, keeping_its_values
from pilot.run.history import Step
from pilot.run.snapshot import Snapshot
from pilot.segment import Segment
from pilot.wire.messages import Fence
from pilot.wire.steps import FULL, StepEncoder, digest_of

FORMAT = 2

_LAST_ROUNDS = 3  # whose lengths show how long the next may be
_LENGTH_KEYS = ("total-tokens", "target-param-data-ratio", "total-batch-size")


# Moves the weights, in place; its result is the outer state from then on. None: to where the outer step wants.
OuterStep = Callable[[Coded | None], Mapping[str, Tensor]]


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
    """The model and the books after `round_number` rounds: all that one round hands to the next.

    `weights` are the global model: what clients hold, or get. What its last step could not say of what the
    outer step wanted is in `outer`, and becomes part of the model with the run's last merge. `last_steps`,
    oldest first, are for clients that missed some.
    """

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
    last_steps: list[Step] = field(default_factory=list)
    _digest: tuple[dict[str, Tensor], str] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def digest(self) -> str:
        """Of the global model."""
        if self._digest is None or self._digest[0] is not self.weights:
            self._digest = self.weights, digest_of(self.weights)
        return self._digest[1]

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
        step: OuterStep | None,
    ) -> None:
        """Take in what a round did: its rows are committed, and `step` is taken; None: nothing was merged.

        `contributions` in the order in which they were folded. Raises LedgerError where the books cannot take a
        contribution, and what `step` raises.
        """
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
        if step is not None:
            self._move(step)
        if self.finished:
            self._settle()

    def _move(self, step: OuterStep) -> None:
        """Clients' next step is `step`, as `wire-down` codes it, or what it wants is the model."""
        outer, wire = self.outer, self.config.wire_down
        if wire == FULL or self.finished:
            self.outer = step(None)
            self._settle(outer)
            return
        before = self.digest
        coded = StepEncoder(lambda name: outer.get(RESIDUAL + name), wire=wire)
        self.outer, self._digest = step(coded), None
        if self.digest != before:  # each step has a file of its own, by the name of where it leads
            self.last_steps = [*self.last_steps, Step(before, self.digest, coded.parts)]
        self.last_steps = self.last_steps[-self.config.mirror_history :]

    def _settle(self, outer: Mapping[str, Tensor] | None = None) -> None:
        """What clients were not sent of the model, as `outer` or the outer state has it, becomes part of it: no
        step leads there."""
        self._digest, self.last_steps = None, []
        outer = self.outer if outer is None else outer
        for key in (residual := _residual(outer)):
            self.weights[key.removeprefix(RESIDUAL)].add_(outer[key])
        if residual and outer is self.outer:
            self.outer = {name: outer[name] for name in outer if name not in residual}

    def take_back(self, before: "RunState", record: RoundRecord, *, term: int) -> None:
        """Be what `before` was, an earlier state of this run, in a round of its own.

        All that was merged since is undone, and its rows are free again.
        """
        first, last = before.round_number + 1, self.round_number
        self.weights, self.outer = before.weights, before.outer
        self.last_steps = before.last_steps
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
        if self.finished:
            self._settle()

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
            "steps": [[step.before, step.after] for step in self.last_steps],
        }
        return Snapshot(
            self.round_number, self.weights, self.outer, state, self.merged_log, self.last_steps
        )

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
            config = keeping_its_values(state["config"], config)
        changes = changes_of(state["config"], config, after=state["round"])
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
            last_steps=list(snapshot.steps),
        )
        if changes:
            resumed._change(changes)
        if resumed.finished:
            resumed._settle()
        return resumed

    def _change(self, changes: list[ConfigChange]) -> None:
        """Drop what means nothing under another configuration."""
        self.config_changes += changes
        self.admission.norms, self.admission.steps = [], []
        keys = {change.key for change in changes}
        if "outer-optimizer" in keys:  # momenta of another optimizer mean something else
            self.outer = {name: self.outer[name] for name in _residual(self.outer)}
        if keys & set(_LENGTH_KEYS):
            self.total_tokens = plan.total_tokens(self.config)


def _residual(outer: Mapping[str, Tensor]) -> list[str]:
    """The names in an outer state of what clients were not sent."""
    return [name for name in outer if name.startswith(RESIDUAL)]


@cache
def versions() -> dict[str, str]:
    """What a snapshot was written with."""
    return {
        "pilot": version("pilot"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": version("flwr"),
    }
