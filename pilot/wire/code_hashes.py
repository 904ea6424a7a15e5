"""Which code a process runs: what both ends of a run must agree on. Standard library only."""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path


@cache
def package_hash(package: str = "pilot") -> str:
    """Hex SHA-256 of the source of this copy of `pilot`, or of another `package` installed here ("": none)."""
    root: Path | None = Path(__file__).resolve().parents[1]
    if package != "pilot":
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        root = Path(places[0]) if places else None
    if root is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def code_hashes() -> dict[str, str]:
    """What this machine trains with, by the name that a hello gives it: all Python that decides on numbers.

    Of a process it is right only if it was asked for when the process began: files may be replaced since.
    """
    return {f"{package} package": package_hash(package) for package in ("pilot", "nanochat")}
