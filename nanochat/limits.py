"""Which numbers may be given at all: finite ones that 64 bits hold. Standard library only."""

import math

from nanochat.errors import UserError

LARGEST = 2**63 - 1  # seeds, sizes and counts beyond it are none for torch


def number_fault(value: float) -> str:
    """What is wrong with a number whatever it is for, as the end of a sentence; "" if nothing."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else "it must be a finite number"
    return "" if abs(value) <= LARGEST else "it must fit into 64 bits"


def check_number(
    name: str, value: float, *, low: float | None = None, high: float | None = None
) -> None:
    """Raise UserError, one sentence that begins with `name`, unless low <= value <= high.

    A number that is not finite is outside of every range.
    """
    fault = number_fault(value)
    if not fault and low is not None and value < low:
        fault = "it must not be negative" if low == 0 else f"it must be at least {low}"
    if not fault and high is not None and value > high:
        fault = f"it must be at most {high:,}"
    if fault:
        raise UserError(f"{name} is {value}: {fault}")
