"""What `pilot run` submits: all that Flower would bundle, and none of what it would only look at."""

import tomllib
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from pilot.launch.bundle import stage

from ..flower_app import write_app


def staged(app: Path, directory: Path) -> Path:
    directory.mkdir()
    project = tomllib.loads((app / "pyproject.toml").read_text())
    return stage(app, project, directory)


def test_the_bundle_is_that_of_the_whole_project(tmp_path: Path) -> None:
    app = write_app(tmp_path / "project", port=1)
    for name in (
        ".venv/lib/big.py",
        "tinyapp/sub/deep.py",
        "tinyapp/__pycache__/x.pyc",
        "other/y.py",
    ):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text("x = 1\n")
    (app / ".gitignore").write_text("client.py\n")
    (app / "LICENSE").write_text("free\n")
    found = staged(app, tmp_path / "scratch")
    assert sorted(path.name for path in found.iterdir() if path.is_dir()) == ["tinyapp"]
    assert build_fab_from_disk(found) == build_fab_from_disk(app)
    assert b"tinyapp/sub/deep.py" in build_fab_from_disk(found)


@pytest.mark.parametrize("pattern", ["**/*.py", "tinyapp", "*.py", "t*/x.py", "absent/*.py"])
def test_a_project_whose_bundle_may_come_from_anywhere_is_submitted_itself(
    tmp_path: Path, pattern: str
) -> None:
    app = write_app(tmp_path / "project", port=1)
    pyproject = app / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("tinyapp/**/*.py", pattern))
    assert staged(app, tmp_path / "scratch") == app
