"""Everything that a run is between two rounds: what a snapshot keeps, and resuming reads back."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from pilot.config import PilotError, RunConfig, Scalar
from pilot.ledger import Ledger
from pilot.messages import Fence
from pilot.snapshot import Snapshot

FORMAT = 1


class ResumeError(PilotError):
    """The run on disk is not the run that was asked for."""


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
    merged: list[Fence] = field(default_factory=list)  # of the last round
    # client → [term, round, lease] of its last merged reply
    last_merged: dict[str, list[int]] = field(default_factory=dict)
    history: list[RoundRecord] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    wandb_id: str | None = None

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

    def to_snapshot(self, *, term: int) -> Snapshot:
        state: dict[str, Any] = {
            "format": FORMAT,
            "run": self.config.run_name,
            "term": term,
            "round": self.round_number,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "empty_rounds": self.empty_rounds,
            "merged": [asdict(fence) for fence in self.merged],
            "last_merged": self.last_merged,
            "history": [asdict(record) for record in self.history],
            "fingerprints": self.fingerprints,
            "wandb_id": self.wandb_id,
            "config": self.config.to_mapping(),
            "config_hash": self.config.training_hash(),
            "ledger": self.ledger.to_state(),
        }
        return Snapshot(self.round_number, self.weights, self.outer, state)

    @staticmethod
    def from_snapshot(
        snapshot: Snapshot,
        config: RunConfig,
        *,
        shard_order: Callable[[int], Sequence[int]],
    ) -> "RunState":
        """Raises ResumeError if `config` would train another model, naming the keys that differ."""
        state = snapshot.state
        if state["format"] != FORMAT:
            raise ResumeError(
                f"run {config.run_name} was written by another version of pilot (format "
                f"{state['format']}, not {FORMAT}): resume it with that version"
            )
        _check_same_training(state["config"], config)
        return RunState(
            config=config,
            weights=snapshot.model,
            outer=snapshot.outer,
            ledger=Ledger.from_state(state["ledger"], shard_order=shard_order),
            total_tokens=state["total_tokens"],
            round_number=state["round"],
            tokens=state["tokens"],
            empty_rounds=state["empty_rounds"],
            merged=[Fence(**fence) for fence in state["merged"]],
            last_merged=state["last_merged"],
            history=[RoundRecord(**record) for record in state["history"]],
            fingerprints=state["fingerprints"],
            wandb_id=state["wandb_id"],
        )


def _check_same_training(before: dict[str, Scalar], config: RunConfig) -> None:
    differing = [
        f"{key} (was {before.get(key)!r}, is {value!r})"
        for key, value in config.training_keys().items()
        if before.get(key) != value
    ]
    if differing:
        raise ResumeError(
            f"run {config.run_name} was started with another configuration: "
            f"{', '.join(differing)}; use the old values to resume it, or another run-name"
        )
