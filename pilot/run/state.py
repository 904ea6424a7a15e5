"""Everything that a run is between two rounds: what a snapshot keeps, and resuming reads back."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pilot import plan
from pilot.config import RunConfig, Scalar
from pilot.errors import PilotError
from pilot.rules.admission import AdmissionBooks
from pilot.rules.ledger import Ledger
from pilot.run.snapshot import Snapshot
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
_LENGTH_KEYS = ("total-tokens", "target-param-data-ratio", "total-batch-size")


class ResumeError(PilotError):
    """The run on disk is not the run that was asked for."""


@dataclass(frozen=True)
class MergedReply:
    """A reply that the model has absorbed; `consumed` are its rows as [epoch, shard, first row, end row]."""

    client: str
    fence: Fence
    tokens: int
    consumed: list[list[int]]

    def line(self) -> str:
        """Its line of merged.jsonl."""
        fence = self.fence
        values = {
            "round": fence.round_number,
            "term": fence.term,
            "lease": fence.lease_id,
            "client": self.client,
            "tokens": self.tokens,
            "consumed": self.consumed,
        }
        return json.dumps(values, separators=(",", ":"))


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


@dataclass
class RunState:
    """The model and the books after `round_number` rounds; all that the outer loop carries on."""

    config: RunConfig
    weights: dict[str, Tensor]
    ledger: Ledger
    total_tokens: int
    outer: dict[str, Tensor] = field(default_factory=dict)
    round_number: int = 0
    tokens: int = 0  # committed
    empty_rounds: int = 0
    merged: list[MergedReply] = field(default_factory=list)  # in the last round
    merged_log: list[str] = field(default_factory=list)  # in all rounds: lines of merged.jsonl
    # client → [term, round, lease] of its last merged reply
    last_merged: dict[str, list[int]] = field(default_factory=dict)
    history: list[RoundRecord] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    wandb_id: str | None = None
    config_changes: list[ConfigChange] = field(default_factory=list)
    admission: AdmissionBooks = field(default_factory=AdmissionBooks)

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

    def record(self, round_number: int) -> RoundRecord | None:
        return next((r for r in self.history if r.round_number == round_number), None)

    def note_merged(self, replies: Sequence[MergedReply]) -> None:
        """Write down what a round merged, in the order in which it was folded."""
        self.merged = list(replies)
        self.merged_log += [reply.line() for reply in replies]
        for reply in replies:
            fence = reply.fence
            self.last_merged[reply.client] = [fence.term, fence.round_number, fence.lease_id]

    def to_snapshot(self, *, term: int) -> Snapshot:
        state: dict[str, Any] = {
            "format": FORMAT,
            "run": self.config.run_name,
            "term": term,
            "round": self.round_number,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "empty_rounds": self.empty_rounds,
            "merged": [asdict(reply) for reply in self.merged],
            "last_merged": self.last_merged,
            "history": [asdict(record) for record in self.history],
            "fingerprints": self.fingerprints,
            "wandb_id": self.wandb_id,
            "config": self.config.to_mapping(),
            "config_hash": self.config.training_hash(),
            "config_changes": [asdict(change) for change in self.config_changes],
            "admission": asdict(self.admission),
            "schedule": self._schedule_position(),
            "versions": versions(),
            "ledger": self.ledger.to_state(),
        }
        return Snapshot(self.round_number, self.weights, self.outer, state, self.merged_log)

    def _schedule_position(self) -> dict[str, float]:
        """Where the next round starts in the schedule: told to people; resuming counts tokens instead."""
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
        """Raises ResumeError if `config` would train another model, naming the keys that differ.

        With `resume-anyway` the new values hold from here on, and `config_changes` lists them; the keys
        that the model's tensors or the ledger's rows depend on can't be changed even so.
        """
        state = snapshot.state
        if state["format"] != FORMAT:
            raise ResumeError(
                f"run {config.run_name} was written by another version of pilot (format "
                f"{state['format']}, not {FORMAT}): resume it with that version"
            )
        changes = _changes(state["config"], config, after=state["round"])
        resumed = RunState(
            config=config,
            weights=snapshot.model,
            outer=snapshot.outer,
            ledger=Ledger.from_state(state["ledger"], shard_order=shard_order),
            total_tokens=state["total_tokens"],
            round_number=state["round"],
            tokens=state["tokens"],
            empty_rounds=state["empty_rounds"],
            merged=[MergedReply(**r | {"fence": Fence(**r["fence"])}) for r in state["merged"]],
            merged_log=list(snapshot.merged),
            last_merged=state["last_merged"],
            history=[RoundRecord(**record) for record in state["history"]],
            fingerprints=state["fingerprints"],
            wandb_id=state["wandb_id"],
            config_changes=[ConfigChange(**change) for change in state["config_changes"]],
            admission=AdmissionBooks(**state["admission"]),
        )
        if changes:
            resumed._change(changes)
        return resumed

    def _change(self, changes: list[ConfigChange]) -> None:
        """Let go of what another configuration can't go on with."""
        self.config_changes += changes
        self.admission.norms = []
        keys = {change.key for change in changes}
        if "outer-optimizer" in keys:  # momenta of another optimizer mean something else
            self.outer = {}
        if keys & set(_LENGTH_KEYS):
            self.total_tokens = plan.total_tokens(self.config)


def versions() -> dict[str, str]:
    """What a snapshot was written with."""
    return {
        "pilot": version("pilot"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flwr": version("flwr"),
    }


def _changes(before: dict[str, Scalar], config: RunConfig, *, after: int) -> list[ConfigChange]:
    """The keys in which `config` would train another model than the run's was; raises ResumeError unless
    they may be changed and the user wants that."""
    changes = [
        ConfigChange(after, key, before.get(key), value)
        for key, value in config.training_keys().items()
        if before.get(key) != value
    ]
    refused = [c for c in changes if c.key in _FIXED_KEYS] if config.resume_anyway else changes
    if refused:
        differing = ", ".join(f"{c.key} (was {c.was!r}, is {c.now!r})" for c in refused)
        remedy = "use the old values to resume it, or another run-name"
        if not any(change.key in _FIXED_KEYS for change in refused):
            remedy += "; resume-anyway=true goes on with the new ones"
        raise ResumeError(
            f"run {config.run_name} was started with another configuration: {differing}; {remedy}"
        )
    return changes
