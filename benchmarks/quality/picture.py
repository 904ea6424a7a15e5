"""Learning curves as one HTML page that opens without a network: an SVG and the numbers below it."""

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 900, 480, 60, 40, 260
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5aa6", "#b8860b", "#0f8b8d", "#7a4b3a", "#5b5b5b")


def write_picture(path: Path, results: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """`results`: of each run its `case` and its `curve` of (tokens, bpb); runs of a case are averaged."""
    curves = {case: _mean(runs) for case, runs in _by_case(results).items()}
    points = [point for curve in curves.values() for point in curve[1:]]
    low, high = min(bpb for _, bpb in points), max(bpb for _, bpb in points)
    last = max(tokens for tokens, _ in points)

    def place(tokens: float, bpb: float) -> str:
        share = (math.log(bpb) - math.log(low)) / max(1e-9, math.log(high) - math.log(low))
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * tokens / last
        return f"{x:.1f},{_HEIGHT - _BOTTOM - (_HEIGHT - 2 * _BOTTOM) * share:.1f}"

    lines = []
    for number, (case, curve) in enumerate(sorted(curves.items(), key=lambda i: i[1][-1][1])):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = ' stroke-dasharray="6 4"' if number // len(_COLOURS) % 2 else ""
        line = " ".join(place(tokens, bpb) for tokens, bpb in curve[1:])
        lines.append(
            f'<polyline fill="none" stroke="{colour}"{dash} stroke-width="2" points="{line}"/>'
        )
        label = html.escape(f"{case}: {curve[-1][1]:.4f}")
        lines.append(
            f'<text x="{_WIDTH - _RIGHT + 12}" y="{30 + 20 * number}" fill="{colour}">{label}</text>'
        )
    axes = "".join(
        f'<text x="{_LEFT - 8}" y="{place(0, value).split(",")[1]}" text-anchor="end">{value:.2f}</text>'
        for value in (low, math.sqrt(low * high), high)
    )
    height = max(_HEIGHT, 40 + 20 * len(curves))
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:14px sans-serif;margin:2em}</style>"
        f"<h1>{html.escape(title)}</h1><p>Validation bits per byte over {last:,} tokens (logarithmic), "
        f"mean of the seeds.</p><svg viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' role='img' "
        f"aria-label='learning curves'>{axes}{''.join(lines)}</svg>\n",
        encoding="utf-8",
    )


def _by_case(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Sequence[tuple[int, float]]]]:
    found: dict[str, list[Sequence[tuple[int, float]]]] = {}
    for run in results:
        found.setdefault(run["case"], []).append(run["curve"])
    return found


def _mean(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    return [
        (statistics.mean(t for t, _ in points), statistics.mean(b for _, b in points))
        for points in zip(*curves, strict=False)
    ]
