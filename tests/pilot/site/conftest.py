"""The SuperNode of a test's own ClientApps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .group_kit import SuperNode


@pytest.fixture
def supernode(tmp_path: Path) -> Iterator[SuperNode]:
    supernode = SuperNode(tmp_path)
    try:
        yield supernode
    finally:
        supernode.close()
