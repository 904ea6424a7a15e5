"""What the processes of a group keep in memory from one order to the next.

Model, optimizer, trainer (with its compiled blocks and batches) and the inner optimizer's state are made for
the first order of a run and used again for the later ones: nothing is compiled or allocated twice. Each order
brings the weights; the fence of the order that left it says whose state the optimizer holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.trainer import Trainer
from pilot import plan
from pilot.config import RunConfig
from pilot.wire.messages import Fence


@dataclass
class _Of:
    """What a model is made for."""

    config: RunConfig
    device: torch.device
    compute_dtype: torch.dtype
    device_rows: int


class Resident:
    """One rank's; `holds` is the fence whose order left the optimizer as it is; None: it is fresh."""

    def __init__(self) -> None:
        self.holds: Fence | None = None
        self._of: _Of | None = None
        self._model: GPT | None = None
        self._optimizer: MuonAdamW | None = None
        self._betas: list[tuple[float, float] | None] = []  # of its groups, of a whole batch
        self._trainer: Trainer | None = None

    def model(
        self,
        config: RunConfig,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        device_rows: int,
    ) -> GPT:
        """The model, with whatever weights it has; a new one if the last order was of another configuration."""
        of = _Of(config, device, compute_dtype, device_rows)
        if self._model is None or self._of != of:
            self.__init__()  # type: ignore[misc]  # the old one is freed first
            self._of = of
            self._model = plan.build_model(config, device=device, compute_dtype=compute_dtype)
        return self._model

    def optimizer(self) -> MuonAdamW:
        """That of the last `model`."""
        assert self._model is not None and self._of is not None
        if self._optimizer is None:
            self._optimizer = plan.make_optimizer(self._of.config, self._model)
            self._betas = [group.get("betas") for group in self._optimizer.param_groups]
        return self._optimizer

    def take_share(self, share: float) -> None:
        """The next steps are of this `share` of the batch (0..1)."""
        plan.take_share(self.optimizer(), self._betas, share)

    def forget_state(self) -> None:
        """The optimizer begins fresh."""
        self.optimizer().state.clear()
        self.holds = None

    def trainer(self, make: Callable[[GPT, MuonAdamW], Trainer]) -> Trainer:
        """The trainer, as if it had taken no step; one that `make` makes if there is none."""
        assert self._model is not None
        if self._trainer is None:
            self._trainer = make(self._model, self.optimizer())
        self._trainer.micro_steps = 0
        return self._trainer
