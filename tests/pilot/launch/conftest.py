"""A machine with a `pilot node`."""

from pathlib import Path

import pytest

from .node_kit import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)
