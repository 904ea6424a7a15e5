"""Row intervals and sets of places do what sets of numbers do."""

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.rules import intervals
from pilot.rules.intervals import UNKNOWN_END, Interval, OrderedPlaces, PlaceSet

PLACES = st.sets(st.integers(0, 1500))  # several words


def numbers(pairs: list[Interval]) -> set[int]:
    return {number for first, end in pairs for number in range(first, end)}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-1, 8))))
def test_intervals_are_a_set_that_takes_every_number_once(additions: list[tuple[int, int]]) -> None:
    pairs: list[Interval] = []
    there: set[int] = set()
    for first, length in additions:
        new = set(range(first, first + length))
        before = list(pairs)
        if new and not new & there:
            intervals.add(pairs, first, first + length)
            there |= new
        else:
            with pytest.raises(ValueError, match="empty, or there already"):
                intervals.add(pairs, first, first + length)
            assert pairs == before
        assert numbers(pairs) == there and intervals.total(pairs) == len(there)
        # as few as can be: sorted, disjoint, and no two touch
        assert all(a[1] < b[0] for a, b in itertools.pairwise(pairs))
        assert numbers(intervals.gaps(pairs, 50)) == set(range(50)) - there
    for end in (35, 20, 7, 0):
        intervals.cut(pairs, end)
        assert numbers(pairs) == {number for number in there if number < end}


def test_front_is_taken_up_to_a_length_and_whole_where_no_end_is_known() -> None:
    pairs = [(3, 10), (12, UNKNOWN_END)]
    assert intervals.take_front(pairs, 4) == (3, 7)
    assert intervals.take_front(pairs, 4) == (7, 10)
    assert intervals.take_front(pairs, 4) == (12, UNKNOWN_END) and pairs == []


@given(PLACES, PLACES, PLACES)
def test_common_places_come_in_order_whatever_was_added_and_discarded(
    some: set[int], gone: set[int], others: set[int]
) -> None:
    places, other = PlaceSet(), PlaceSet()
    for place in some:
        places.add(place)
        places.add(place)
    for place in gone:
        places.discard(place)
        places.discard(place)
    for place in others:
        other.add(place)
    left = some - gone
    assert list(places.common(other)) == list(other.common(places)) == sorted(left & others)
    assert bool(places) == bool(left)


@given(st.lists(st.booleans(), max_size=600))
def test_places_of_flags_are_those_of_the_ones(flags: list[bool]) -> None:
    places = PlaceSet.from_flags(bytes(b"01"[flag] for flag in flags))
    assert list(places.common(places)) == [i for i, flag in enumerate(flags) if flag]


@given(st.integers(1, 600), PLACES, PLACES, st.randoms(use_true_random=False))
def test_places_of_an_order_are_where_the_flagged_numbers_stand(
    length: int, flagged: set[int], others: set[int], random: Random
) -> None:
    order = random.sample(range(length), length)
    places = OrderedPlaces(order, bytes(b"01"[number in flagged] for number in range(length)))
    expected = sorted(others & {order.index(number) for number in flagged if number < length})
    for _ in range(2):  # made, then remembered
        assert list(PlaceSet.of(others).common(places)) == expected
