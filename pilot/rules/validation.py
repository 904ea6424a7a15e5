"""What the clients' validation figures are worth: one figure of those that agree, and who does not.

Each client scores a slice of the validation rows in pieces, and a piece of another client's slice a second time
(`slices`). A figure that cannot be (bytes that differ, nats where none were asked) or that the others
contradict is left out and reported; the rest add up to an exact bpb of the rows that they stand on. Only
figures of all rows are ever compared with one another.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pilot.segment import Score

# Two clients that score the same rows differ by rounding: bf16 against fp32 made 0.1-0.3 % of the nats.
MAX_APART = 0.02
# Slices are different text. Of the median of the others, an honest slice of a few rows was between 0.7 and 1.4.
MAX_FACTOR = 2.0
# No model of text needs fewer bits for a byte; the best ones need about 0.5.
MIN_BPB = 0.05
_CHECKED_SHARE = 8  # one row in this number of a slice is scored by two clients
_BLOCKS = 16  # of all rows: pieces are compared from round to round, whatever the number of clients

Slice = tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """What one client is to score: its `own` slice, and the `pieces` in which it tells it, among them one of
    another client's slice."""

    own: Slice
    pieces: tuple[Slice, ...]

    def is_own(self, piece: Slice) -> bool:
        return self.own[0] <= piece[0] and piece[1] <= self.own[1]

    @property
    def without_check(self) -> "Asked":
        """Its own slice alone."""
        return Asked(self.own, tuple(piece for piece in self.pieces if self.is_own(piece)))


NOTHING = Asked((0, 0), ())


def slices(rows: int, clients: int) -> list[Asked]:
    """What each client scores of `rows` rows: its own slice, whose first rows are also another's, and those of
    the next client's.

    Pieces end where blocks of all rows end, so that figures of different numbers of clients have some in
    common.
    """
    own = [(i * rows // clients, (i + 1) * rows // clients) for i in range(clients)]
    heads = [(f, min(e, f + max(1, (e - f) // _CHECKED_SHARE))) for f, e in own]
    blocks = {i * rows // _BLOCKS for i in range(_BLOCKS)}
    asked = []
    for i, slice_ in enumerate(own):
        pieces = _cut(slice_, {*blocks, heads[i][1]})
        if clients > 1:
            pieces += _cut(heads[(i + 1) % clients], blocks)
        asked.append(Asked(slice_, tuple(pieces)))
    return asked


def _cut(slice_: Slice, at: Collection[int]) -> list[Slice]:
    first, end = slice_
    ends = sorted({end, *(row for row in at if first < row < end)})
    return [(f, e) for f, e in zip([first, *ends], ends, strict=False) if e > f]


@dataclass(frozen=True)
class Figure:
    """How good a model is, by the clients that can be believed.

    `scores`: one for each piece that was scored, of a client that is believed. `doubts`: sentences for people,
    one for each contradiction. `by_client`: what each client that is believed has scored.
    """

    scores: tuple[Score, ...] = ()
    by_client: Mapping[str, Sequence[Score]] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return sum(score.end_row - score.first_row for score in self.scores)

    @property
    def bpb(self) -> float | None:
        return bpb(self.scores)


def bpb(scores: Sequence[Score]) -> float | None:
    """Bits per byte of `scores` together; None without a byte."""
    # sorted, so that the order of arrival makes no difference
    nats = sum(sorted(score.nats for score in scores))
    num_bytes = sum(score.num_bytes for score in scores)
    return nats / (math.log(2) * num_bytes) if num_bytes else None


def figure(
    asked: Mapping[str, Asked],
    said: Mapping[str, Sequence[Score]],
    *,
    last_bpb: float | None = None,
) -> Figure:
    """The figure of a model from what each client was asked and said; `last_bpb` that of the version before."""
    doubts: list[str] = []
    scores = {}
    for client in sorted(said):
        kept, doubt = _possible(asked.get(client, NOTHING), said[client])
        if doubt:
            doubts.append(f"{client} {doubt}: its figure is left out")
        elif kept:
            scores[client] = kept
    for client, doubt in _contradicted(scores, last_bpb).items():
        doubts.append(f"{client} {doubt}: its figure is left out")
        del scores[client]
    doubts += [
        f"{one} and {other} disagree on validation rows {first}..{end}: {ours:.4g} and {theirs:.4g} nats"
        for one, other, (first, end), ours, theirs in _apart(scores)
    ]
    return Figure(_once_each(asked, scores), scores, tuple(doubts))


def _possible(asked: Asked, said: Sequence[Score]) -> tuple[list[Score], str]:
    """The scores that were asked for, and what is wrong with one of them, as a clause."""
    kept = {score.piece: score for score in said if score.piece in (*asked.pieces, asked.own)}
    if len(said) > len(kept) or (
        asked.own in kept and len(kept) > 1 and asked.own not in asked.pieces
    ):
        return [], "scored validation rows that it was not asked for, or twice"
    value = bpb(list(kept.values()))
    if kept and (value is None or not value >= MIN_BPB):
        return (
            [],
            f"says {0.0 if value is None else value:.4g} bits per byte, which no model reaches",
        )
    return list(kept.values()), ""


def _contradicted(scores: Mapping[str, Sequence[Score]], last_bpb: float | None) -> dict[str, str]:
    """Client → what the others' figures say against its own, as a clause; those that can't be decided are not
    in it."""
    values = {client: bpb(theirs) or 0.0 for client, theirs in scores.items()}
    out: dict[str, str] = {}
    while len(left := {c: v for c, v in values.items() if c not in out}) >= 3:
        off = {
            c: _off(v, statistics.median(w for d, w in left.items() if d != c))
            for c, v in left.items()
        }
        worst = max(off, key=lambda client: (off[client], client))
        if off[worst] <= MAX_FACTOR:
            break
        out[worst] = f"says {left[worst]:.4f} bits per byte where the others say otherwise"
    if len(left) == 2 and last_bpb and _off(*left.values()) > MAX_FACTOR:
        # only a figure that is too good: a much worse one may be the first sign of a spoilt model
        far = [c for c, v in left.items() if v * MAX_FACTOR < last_bpb]
        if len(far) == 1:
            out[far[0]] = (
                f"says {left[far[0]]:.4f} bits per byte, which neither the other client nor the last round "
                f"({last_bpb:.4f}) bears out"
            )
    out |= _alone(_apart({c: s for c, s in scores.items() if c not in out}))
    return out


def _off(one: float, other: float) -> float:
    small, large = sorted((one, other))
    return large / small if small > 0 else math.inf


_Apart = tuple[str, str, Slice, float, float]


def _apart(scores: Mapping[str, Sequence[Score]]) -> list[_Apart]:
    """Pairs of clients that scored the same rows and disagree: who, where, and what each says."""
    by_piece: dict[Slice, list[tuple[str, Score]]] = {}
    for client in sorted(scores):
        for score in scores[client]:
            by_piece.setdefault(score.piece, []).append((client, score))
    return [
        (one, other, piece, ours.nats, theirs.nats)
        for piece, pairs in sorted(by_piece.items())
        for (one, ours), (other, theirs) in itertools.pairwise(pairs)
        if ours.num_bytes != theirs.num_bytes or _off(ours.nats, theirs.nats) > 1 + MAX_APART
    ]


def _alone(apart: Sequence[_Apart]) -> dict[str, str]:
    """Clients that two others contradict, each of whom nobody else contradicts."""
    against: dict[str, set[str]] = {}
    for one, other, *_ in apart:
        against.setdefault(one, set()).add(other)
        against.setdefault(other, set()).add(one)
    return {
        client: f"is contradicted by {' and '.join(sorted(others))} on rows that they have scored as well"
        for client, others in sorted(against.items())
        if len(others) > 1 and all(against[other] == {client} for other in others)
    }


def _once_each(
    asked: Mapping[str, Asked], scores: Mapping[str, Sequence[Score]]
) -> tuple[Score, ...]:
    """Scores in which no row counts twice: those of each slice by its owner, else by any that scored part of
    it."""
    every = [(client, score) for client in asked for score in scores.get(client, ())]
    every.sort(key=lambda one: not asked[one[0]].is_own(one[1].piece))  # stable: owners first
    found, rows = [], set[int]()
    for _, score in every:
        mine = range(*score.piece)
        if rows.isdisjoint(mine):
            found.append(score)
            rows.update(mine)
    return tuple(sorted(found))
