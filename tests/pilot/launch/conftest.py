"""A machine with a `pilot node`, and a metadata service."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .metadata_kit import Service, serve
from .node_kit import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A metadata service; `PILOT_METADATA_URL` is its address."""
    with serve() as running:
        monkeypatch.setenv("PILOT_METADATA_URL", running.url)
        yield running
