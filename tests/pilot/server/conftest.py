"""A round that is open, whose books are right at the end of every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .round_kit import Round


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Round]:
    round_ = Round(tmp_path)
    yield round_
    books = round_.state.ledger
    assert books.rows_leased == books.rows_committed + books.rows_returned + books.rows_open
