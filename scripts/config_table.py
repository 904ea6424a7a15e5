"""Write the README's table of run-config keys from `RunConfig`, the one place where they are declared."""

import dataclasses
import json
from pathlib import Path

from nanochat.files import atomic_write_text
from pilot.config import DEFAULTS, RunConfig

README = Path(__file__).resolve().parents[1] / "README.md"
_BEGIN, _END = "<!-- run-config:", "<!-- /run-config -->"


def table() -> str:
    """Markdown: key, default, meaning; one line per key."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for declared in dataclasses.fields(RunConfig):
        key = declared.name.replace("_", "-")
        meaning = declared.metadata["help"]
        if declared.metadata["choices"]:
            meaning += f" ({', '.join(declared.metadata['choices'])})"
        lines.append(f"| `{key}` | `{json.dumps(DEFAULTS[key])}` | {meaning} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """`readme` with the table between its two markers replaced."""
    begin = readme.index("\n", readme.index(_BEGIN)) + 1
    return f"{readme[:begin]}{table()}\n{readme[readme.index(_END) :]}"


if __name__ == "__main__":
    atomic_write_text(README, with_table(README.read_text(encoding="utf-8")))
