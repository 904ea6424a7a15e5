"""The report's last lines: a row per check, its figures in short, and what failed below it."""

from typing import Any

from benchmarks.gpu_check.runner import Outcome


def table(outcomes: list[Outcome]) -> str:
    width = max((len(outcome.check) for outcome in outcomes), default=5)
    lines = [f"{'check':<{width}}  result      s  figures"]
    for outcome in outcomes:
        result = "skipped" if outcome.skipped else "pass" if outcome.passed else "FAIL"
        figures = outcome.skipped or _short(outcome.figures)
        lines.append(f"{outcome.check:<{width}}  {result:<7} {outcome.seconds:5.0f}  {figures}")
        lines += [f"{'':<{width}}    ! {failure}" for failure in outcome.failures]
    passed = sum(outcome.passed for outcome in outcomes)
    lines.append(f"{passed} of {len(outcomes)} passed")
    return "\n".join(lines)


def _short(figures: dict[str, Any]) -> str:
    """Numbers and words on one line; what has parts of its own is in the JSON lines."""
    flat = {k: v for k, v in figures.items() if not isinstance(v, dict | list)}
    return " ".join(f"{name}={value}" for name, value in flat.items())
