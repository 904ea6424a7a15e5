"""`scripts.base_train` of which rank 1 fails in its "evaluation" or its third "step", as FAILS says."""

import os
from typing import Any

from nanochat import watch
from nanochat.common import run_command_line
from nanochat.errors import UserError
from nanochat.trainer import Trainer
from scripts import base_train


def _fails(*_: Any) -> Any:
    raise UserError("this rank fails")


_micro_step = Trainer._micro_step


def _fails_in_the_third_step(trainer: Trainer, rows: Any, scale: float) -> Any:
    if trainer.micro_steps > 2 * 2:  # of two per step
        _fails()
    return _micro_step(trainer, rows, scale)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        if os.environ["FAILS"] == "evaluation":
            watch.bpb_sums = _fails
        else:
            Trainer._micro_step = _fails_in_the_third_step  # type: ignore[method-assign]
    run_command_line(base_train.main)
