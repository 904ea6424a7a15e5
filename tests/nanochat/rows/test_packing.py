"""The packing rules against a packer that is too simple to be wrong."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.rows import packing
from nanochat.rows.packing import PackState, make_packer, row_dtype

BOS = 999
DTYPE = np.dtype("<u2")

documents_strategy = st.lists(st.integers(0, 30), max_size=60).map(
    lambda lengths: [
        [(7 * number + i) % 900 for i in range(length)] for number, length in enumerate(lengths)
    ]
)


def naive_bestfit(documents: list[list[int]], sequence_len: int, buffer: int) -> list[list[int]]:
    """The rule read aloud: fill the buffer, scan it for the longest that fits, else the shortest."""
    waiting = [[BOS, *document] for document in documents if document]
    rows, held, row = [], [], []
    while waiting or held:
        while waiting and len(held) < buffer:
            held.append(waiting.pop(0))
        room = sequence_len + 1 - len(row)
        fitting = [document for document in held if len(document) <= room]
        chosen = max(fitting, key=len) if fitting else min(held, key=len)
        held.remove(chosen)
        row += chosen[:room]
        if len(row) == sequence_len + 1:
            rows.append(row)
            row = []
    return rows


def naive_stream(documents: list[list[int]], sequence_len: int) -> list[list[int]]:
    """Token by token, with a BOS of its own at a row's start unless a document starts there."""
    rows, row = [], []
    for document in documents:
        for token in [BOS, *document] if document else []:
            if not row and token != BOS:
                row = [BOS]
            row.append(token)
            if len(row) == sequence_len + 1:
                rows.append(row)
                row = []
    return rows


def numbered(documents: list[list[int]], state: PackState | None = None) -> Iterator:
    for number, document in enumerate(documents):
        if state is None or state.wants(number):
            yield number, np.array(document, dtype=DTYPE)


def packer(name: str, sequence_len: int, state: PackState | None = None) -> packing.Packer:
    return make_packer(name, sequence_len=sequence_len, bos=BOS, dtype=DTYPE, state=state)


def as_lists(rows: Iterable[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in rows]


@given(documents_strategy, st.integers(1, 24), st.sampled_from([1, 3, 1000]))
@settings(max_examples=150, deadline=None)
def test_bestfit_equals_the_naive_reference(documents, sequence_len, buffer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", buffer)
        rows = as_lists(packer("bestfit", sequence_len).rows(numbered(documents)))
    assert rows == naive_bestfit(documents, sequence_len, buffer)


@given(documents_strategy, st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_stream_equals_the_naive_reference(documents, sequence_len):
    rows = as_lists(packer("stream", sequence_len).rows(numbered(documents)))
    assert rows == naive_stream(documents, sequence_len)


@given(documents_strategy, st.integers(1, 24), st.sampled_from(packing.PACKINGS))
@settings(max_examples=100, deadline=None)
def test_every_row_starts_with_bos_and_no_token_is_invented_or_lost(documents, sequence_len, name):
    one = packer(name, sequence_len)
    rows = as_lists(one.rows(numbered(documents)))
    assert all(len(row) == sequence_len + 1 and row[0] == BOS for row in rows)
    assert one.documents == sum(map(bool, documents))
    assert one.tokens == sum(len(document) + 1 for document in documents if document)
    in_rows = sum(len(row) for row in rows)
    if name == "bestfit":
        assert in_rows == one.tokens - one.discarded_tokens
    else:  # rows that begin inside a document repeat a BOS
        flat = [token for row in rows for token in row if token != BOS]
        everything = [token for document in documents for token in document]
        assert flat == everything[: len(flat)]
        assert one.discarded_tokens <= sequence_len


@given(documents_strategy, st.integers(1, 12), st.sampled_from(packing.PACKINGS), st.data())
@settings(max_examples=150, deadline=None)
def test_packing_continued_from_any_row_gives_the_same_rows_and_counts(
    documents, sequence_len, name, data
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BUFFER_DOCUMENTS", 4)
        whole = packer(name, sequence_len)
        rows, states = [], [whole.state()]
        for row in whole.rows(numbered(documents)):
            rows.append(row.tolist())
            states.append(whole.state())
        state = data.draw(st.sampled_from(states))
        again = packer(name, sequence_len, state)
        tail = as_lists(again.rows(numbered(documents, state)))
    assert tail == rows[state.rows :]
    assert again.state() == whole.state()


def test_a_row_is_not_overwritten_by_the_next_one():
    rows = list(packer("stream", 2).rows(numbered([[1, 2, 3, 4, 5, 6]])))
    assert as_lists(rows) == [[BOS, 1, 2], [BOS, 3, 4], [BOS, 5, 6]]


def test_of_equally_long_documents_the_earliest_is_taken():
    rows = as_lists(packer("bestfit", 5).rows(numbered([[1, 1], [2, 2], [3, 3], [4, 4]])))
    assert rows == [[BOS, 1, 1, BOS, 2, 2], [BOS, 3, 3, BOS, 4, 4]]


def test_when_none_fits_the_shortest_is_cropped():
    rows = as_lists(packer("bestfit", 3).rows(numbered([[1] * 9, [2] * 5, [3] * 7])))
    assert rows == [[BOS, 2, 2, 2], [BOS, 3, 3, 3], [BOS, 1, 1, 1]]


def test_no_documents_give_no_rows():
    for name in packing.PACKINGS:
        one = packer(name, 4)
        assert as_lists(one.rows(numbered([[], []]))) == []
        assert dataclasses.replace(one.state(), next_document=0) == PackState()


def test_ids_are_stored_in_the_smallest_type_that_holds_them():
    assert row_dtype(65_536) == np.uint16
    assert row_dtype(65_537) == np.uint32
