"""The files of a Flower app that `flwr run` needs, in a directory of their own.

`flwr run` looks at every file below the app's directory before it applies `fab-include`. Where a virtual
environment lies in the project, that is 40,000 files and eight seconds of a processor for each submission.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WILDCARDS = set("*?[!")


def stage(app: Path, project: Mapping[str, Any], directory: Path) -> Path:
    """What Flower would bundle of `app`, copied below `directory`; the directory to submit.

    That is `app` itself, and nothing is copied, unless each of the app's `fab-include` patterns begins with the
    name of a directory: only then are other directories known to hold nothing that is bundled.
    `project`: the content of its pyproject.toml.
    """
    patterns = project["tool"]["flwr"]["app"].get("fab-include")
    names = _top_directories(patterns) if isinstance(patterns, list) else set()
    if not names or not all((app / name).is_dir() for name in names):
        return app
    staged = directory / "app"
    staged.mkdir()
    for path in app.iterdir():
        if path.is_file():  # pyproject.toml, .gitignore, what Flower adds by itself
            shutil.copy(path, staged)
    for name in names:
        shutil.copytree(app / name, staged / name, ignore=shutil.ignore_patterns("__pycache__"))
    return staged


def _top_directories(patterns: list[Any]) -> set[str]:
    """The first component of each pattern; none at all if one could match anywhere."""
    names = set()
    for pattern in patterns:
        name, slash, rest = str(pattern).removeprefix("/").partition("/")
        if not (slash and rest) or not name or _WILDCARDS & set(name) or name in (".", ".."):
            return set()
        names.add(name)
    return names
