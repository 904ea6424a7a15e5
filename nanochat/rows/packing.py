"""Pure rules that turn a shard's documents into rows of T+1 tokens.

Every row starts with BOS, none is padded, and the rows of a shard depend on nothing but its
documents, the tokenizer's ids, T and the packing: not on threads, batches, or whether a packer was
interrupted.

`bestfit` puts whole documents into rows and crops one only to fill a row exactly: no row starts in
the middle of a document, but 30-47 % of the tokens are discarded at T = 2048 and 65-70 % at T = 512
(measured on technical documentation). `stream` concatenates the documents, each behind a BOS, and
cuts; a document that continues in the next row gets a BOS there too, so that every token of every
document is a target once. It discards the shard's last, incomplete row only.
"""

import abc
import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

PACKING_VERSION = 1  # raise it when any row of any shard changes: it is part of cache names
PACKINGS = ("bestfit", "stream")
BUFFER_DOCUMENTS = 1000  # from which bestfit chooses

# (number of the document in its shard, its token ids without BOS)
Document = tuple[int, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class PackState:
    """Where packing stands at the end of a row; with the shard, enough to continue from there."""

    rows: int = 0
    documents: int = 0  # taken so far, empty ones not counted
    tokens: int = 0  # of these documents, each with its BOS
    discarded_tokens: int = 0  # of these, in no row
    next_document: int = 0  # the first one that was never looked at
    held: tuple[int, ...] = ()  # earlier ones that are not (wholly) packed yet, ascending
    offset_tokens: int = 0  # of the held one, packed already (stream only)

    def wants(self, document: int) -> bool:
        """Whether a packer that continues from here needs this document."""
        return document >= self.next_document or document in self.held


class Packer(abc.ABC):
    """Packs one shard. Feed it, in file order, the documents that its first state `wants`."""

    def __init__(self, state: PackState, *, sequence_len: int, bos: int, dtype: np.dtype) -> None:
        self.capacity = sequence_len + 1
        self.bos = bos
        self.dtype = dtype
        self.num_rows = state.rows
        self.documents = state.documents
        self.tokens = state.tokens
        self.discarded_tokens = state.discarded_tokens
        self.next_document = state.next_document
        self.offset_tokens = state.offset_tokens

    @abc.abstractmethod
    def rows(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Rows (T+1,), each an array of its own. At each yield `state()` includes that row."""

    @abc.abstractmethod
    def held(self) -> list[int]:
        """Numbers of the documents that are read and not wholly packed."""

    def state(self) -> PackState:
        """The state; defined when `rows` has just yielded a row, and after its end."""
        return PackState(
            rows=self.num_rows,
            documents=self.documents,
            tokens=self.tokens,
            discarded_tokens=self.discarded_tokens,
            next_document=self.next_document,
            held=tuple(sorted(self.held())),
            offset_tokens=self.offset_tokens,
        )


class BestFitPacker(Packer):
    """The longest buffered document that fits goes next; if none does, the shortest is cropped.

    A document's length includes its BOS. Of equally long ones the earliest is taken.
    """

    def __init__(self, state: PackState, *, sequence_len: int, bos: int, dtype: np.dtype) -> None:
        super().__init__(state, sequence_len=sequence_len, bos=bos, dtype=dtype)
        self._order: list[tuple[int, int]] = []  # (length, -number), ascending
        self._buffer: dict[int, np.ndarray] = {}

    def held(self) -> list[int]:
        return list(self._buffer)

    def rows(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        source = iter(documents)
        row, filled = np.empty(self.capacity, dtype=self.dtype), 0
        while self._fill(source):
            document = self._take(self.capacity - filled)
            used = min(len(document), self.capacity - filled - 1)
            row[filled] = self.bos
            row[filled + 1 : filled + 1 + used] = document[:used]
            filled += 1 + used
            self.documents += 1
            self.tokens += 1 + len(document)
            self.discarded_tokens += len(document) - used
            if filled == self.capacity:
                self.num_rows += 1
                yield row
                row, filled = np.empty(self.capacity, dtype=self.dtype), 0
        self.discarded_tokens += filled  # no padding: the last, incomplete row is dropped

    def _fill(self, source: Iterator[Document]) -> bool:
        """Top the buffer up; False if nothing is left to pack."""
        while len(self._order) < BUFFER_DOCUMENTS:
            item = next(source, None)
            if item is None:
                break
            number, document = item
            self.next_document = max(self.next_document, number + 1)
            if len(document):
                bisect.insort(self._order, (len(document) + 1, -number))
                self._buffer[number] = document
        return bool(self._order)

    def _take(self, room: int) -> np.ndarray:
        """Remove and return the document that goes next where `room` tokens are left."""
        limit = max(room, self._order[0][0])  # none fits: the shortest
        index = bisect.bisect_right(self._order, (limit, 1)) - 1  # longest <= limit, then earliest
        _, negative_number = self._order.pop(index)
        return self._buffer.pop(-negative_number)


class StreamPacker(Packer):
    """Documents one after the other, cut wherever a row is full."""

    def __init__(self, state: PackState, *, sequence_len: int, bos: int, dtype: np.dtype) -> None:
        super().__init__(state, sequence_len=sequence_len, bos=bos, dtype=dtype)
        self._held = list(state.held)  # at most one

    def held(self) -> list[int]:
        return self._held

    def rows(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        row, filled, added_bos = np.empty(self.capacity, dtype=self.dtype), 0, 0
        for number, document in documents:
            continued = number in self._held
            self.next_document = max(self.next_document, number + 1)
            if not len(document):
                continue
            position = self.offset_tokens if continued else 0
            if not continued:
                self.documents += 1
                self.tokens += 1 + len(document)
            own_bos_due = not continued
            while own_bos_due or position < len(document):
                if own_bos_due or not filled:
                    row[filled] = self.bos
                    filled += 1
                    added_bos += not own_bos_due
                    own_bos_due = False
                take = min(self.capacity - filled, len(document) - position)
                row[filled : filled + take] = document[position : position + take]
                filled += take
                position += take
                if filled == self.capacity:
                    unfinished = position < len(document)
                    self._held = [number] if unfinished else []
                    self.offset_tokens = position if unfinished else 0
                    self.num_rows += 1
                    yield row
                    row, filled, added_bos = np.empty(self.capacity, dtype=self.dtype), 0, 0
        self._held, self.offset_tokens = [], 0
        self.discarded_tokens += filled - added_bos


_PACKERS: dict[str, type[Packer]] = {"bestfit": BestFitPacker, "stream": StreamPacker}


def make_packer(
    packing: str, *, sequence_len: int, bos: int, dtype: np.dtype, state: PackState | None = None
) -> Packer:
    """The packer called `packing`, for the start of a shard or to continue from `state`."""
    return _PACKERS[packing](state or PackState(), sequence_len=sequence_len, bos=bos, dtype=dtype)


def row_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
