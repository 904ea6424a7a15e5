"""`scripts.base_train` of which rank 1 fails in its part of the first validation: run by torchrun."""

import os
from typing import Any

from nanochat import watch
from nanochat.common import run_command_line
from nanochat.errors import UserError
from scripts import base_train


def _fails(*_: Any) -> Any:
    raise UserError("this rank fails")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        watch.bpb_sums = _fails
    run_command_line(base_train.main)
