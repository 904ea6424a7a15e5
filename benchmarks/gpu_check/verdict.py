"""What a check is given, and what it reports: figures, and each bound that was not kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a check runs on. `options` are the check's own; `tiny` shrinks every size.

    `directory` is shared by all checks of one call and holds data, compile caches and runs.
    """

    device: str
    tiny: bool
    directory: Path
    options: dict[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


@dataclass
class Verdict:
    """Figures, and a sentence for each bound that was not kept.

    Bounds of speed and memory are those of one H100 (SXM, 80 GB): elsewhere the figure is only printed.
    """

    on_h100: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    save: Callable[[], None] = lambda: (
        None
    )  # after each figure: one that is ended keeps what it has

    def note(self, name: str, value: Any) -> None:
        self.figures[name] = _rounded(value)
        self.save()

    def at_most(self, name: str, value: float, bound: float) -> None:
        self.note(name, value)
        if not value <= bound:  # NaN fails
            self.failures.append(f"{name} is {value:.4g}, at most {bound:g}")

    def at_least(self, name: str, value: float, bound: float) -> None:
        self.note(name, value)
        if not value >= bound:
            self.failures.append(f"{name} is {value:.4g}, at least {bound:g}")

    def h100_at_most(self, name: str, value: float, bound: float) -> None:
        self.at_most(name, value, bound if self.on_h100 else math.inf)

    def h100_at_least(self, name: str, value: float, bound: float) -> None:
        self.at_least(name, value, bound if self.on_h100 else -math.inf)

    def that(self, holds: bool, sentence: str) -> None:
        """`sentence` says what is wrong if it does not hold."""
        if not holds:
            self.failures.append(sentence)


def _rounded(value: Any) -> Any:
    """Four digits: nothing here is known better."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
