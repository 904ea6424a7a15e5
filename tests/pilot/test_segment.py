"""Runs of rows."""

import pytest

from pilot.segment import Segment, first_rows

LEASE = [Segment(0, 3, 10, 14), Segment(0, 5, 0, 0), Segment(0, 7, 2, None)]


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        (0, []),
        (3, [Segment(0, 3, 10, 13)]),
        (4, [Segment(0, 3, 10, 14)]),
        (6, [Segment(0, 3, 10, 14), Segment(0, 7, 2, 4)]),
        (99, [Segment(0, 3, 10, 14), Segment(0, 7, 2, 20)]),
    ],
)
def test_the_first_rows_of_a_lease_are_a_prefix_of_it(rows: int, taken: list[Segment]) -> None:
    assert first_rows(LEASE, rows, shard_rows=20) == taken
