"""Pin every dependency in pyproject.toml, where a lock file can't be committed.

    python -m scripts.pin_versions            resolve again and write the pins
    python -m scripts.pin_versions --check    fail if a fresh resolution disagrees with them

uv.lock names package hosts and so stays out of git; `[tool.uv] constraint-dependencies` holds the same
versions, and `build-constraint-dependencies` those of the build backends.
"""

import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat.common import ArgumentParser, run_command_line
from nanochat.errors import UserError
from nanochat.files import atomic_write_text

ROOT = Path(__file__).resolve().parents[1]
_BUILD_BACKENDS = ("hatchling", "maturin")
_TABLE = re.compile(r"^(?P<name>(?:build-)?constraint-dependencies) = \[\n(?:.*\n)*?\]\n", re.M)


def main() -> None:
    parser = ArgumentParser(prog="python -m scripts.pin_versions", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    arguments = parser.parse_args()
    path = ROOT / "pyproject.toml"
    before = path.read_text(encoding="utf-8")
    after = with_pins(before, resolve(before if arguments.check else without_pins(before)))
    if arguments.check and before != after:
        raise UserError(
            "the pins in pyproject.toml are not complete: run `python -m scripts.pin_versions`"
        )
    if before != after:
        atomic_write_text(path, after)
    print(f"{len(_pins(after))} versions are pinned")


def resolve(pyproject: str) -> list[dict[str, Any]]:
    """The packages of a fresh resolution of `pyproject`, as uv.lock lists them."""
    uv = shutil.which("uv")
    if uv is None:
        raise UserError("uv is not installed: pip install uv")
    with tempfile.TemporaryDirectory() as directory:
        project = Path(directory)
        (project / "pyproject.toml").write_text(pyproject, encoding="utf-8")
        shutil.copy(ROOT / "README.md", project)
        shutil.copytree(
            ROOT / "rustbpe", project / "rustbpe", ignore=shutil.ignore_patterns("target", "*.so")
        )
        done = subprocess.run([uv, "lock"], cwd=project, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"uv can't resolve the dependencies: {done.stderr.strip()}")
        lock = tomllib.loads((project / "uv.lock").read_text(encoding="utf-8"))
    packages: list[dict[str, Any]] = lock["package"]
    return packages


def without_pins(pyproject: str) -> str:
    return _TABLE.sub(lambda found: f"{found['name']} = [\n]\n", pyproject)


def with_pins(pyproject: str, packages: list[dict[str, Any]]) -> str:
    """`pyproject` with both tables rewritten from `packages`."""
    build = _closure(packages, _BUILD_BACKENDS)
    pins = {
        "constraint-dependencies": packages,
        "build-constraint-dependencies": [p for p in packages if p["name"] in build],
    }

    def table(found: re.Match[str]) -> str:
        lines = sorted(line for package in pins[found["name"]] for line in _lines(package))
        return f"{found['name']} = [\n" + "".join(f"  {line}\n" for line in lines) + "]\n"

    return _TABLE.sub(table, pyproject)


def _lines(package: dict[str, Any]) -> Iterable[str]:
    """The pin of a package; none for our own, one for each environment where versions differ."""
    if "registry" not in package["source"]:
        return
    pin = f"{package['name']}=={package['version']}"
    pythons = {_python(marker) for marker in package.get("resolution-markers", [])}
    for python in sorted(pythons) or [""]:
        yield f'"{pin}{python}",'


def _python(marker: str) -> str:
    """The part of a marker that speaks of Python's version: no version differs by platform here."""
    found = re.search(r"python_full_version (?:<|>=) '[^']+'", marker)
    return f" ; {found[0]}" if found else ""


def _closure(packages: list[dict[str, Any]], roots: Iterable[str]) -> set[str]:
    """`roots` and all that they depend on."""
    dependencies = {p["name"]: [d["name"] for d in p.get("dependencies", [])] for p in packages}
    reached: set[str] = set()
    open_names = list(roots)
    while open_names:
        name = open_names.pop()
        if name not in reached:
            reached.add(name)
            open_names += dependencies.get(name, [])
    return reached


def _pins(pyproject: str) -> list[str]:
    pins: list[str] = tomllib.loads(pyproject)["tool"]["uv"]["constraint-dependencies"]
    return pins


if __name__ == "__main__":
    run_command_line(main)
