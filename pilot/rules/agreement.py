"""Whether the updates of one round agree: how long each is beside the others, and where it points.

Norms of earlier rounds (`admission.norm_refusal`) say nothing in a run's first round, and a long update in
the right direction is another matter than a short one in the wrong. Here the clients of a round judge one
another, all at once when it is over, so that the order of arrival decides nothing. One client that is wrong
can be recognised where three take part; of two that disagree, the outer momentum tells which one turns
round.

What is an honest spread was measured: docs/log.md.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_CLIENTS = 3
# An update may be this many times longer than the median of the others of its round: twice what honest clients
# showed, of which one had lost its optimizer's state and took a few steps where the others took many.
MAX_NORM_RATIO = 6.0
# Where the others agree with one another by a cosine above the first number, an update whose own cosine
# with them is less than the second part of that is not this model's: noise has none. The least that an
# honest client had was 0.05, in a round that it began with a fresh optimizer.
MIN_AGREEMENT, MIN_AIM = 0.3, 0.02
# Two clients disagree below this cosine, and of the two the one is wrong that also points so against the
# momentum.
MIN_PAIR_COSINE = -0.2
_ROUNDING = 1e-12  # of a sum of cosines


@dataclass(frozen=True)
class Votes:
    """One update per client, as the rule sees them: their dot products, and how long each trained.

    `gram[i][j]`: the dot product of the updates of `clients[i]` and `clients[j]`. `steps`: optimizer steps, in
    fractions too. `heading[i]`: the cosine between an update and the outer momentum; None before there is one.
    """

    clients: Sequence[str]
    steps: Sequence[float]
    gram: Sequence[Sequence[float]]
    heading: Sequence[float] | None = None

    @cached_property
    def norms(self) -> Array:
        return np.sqrt(np.maximum(0.0, np.diagonal(self._gram)))

    @cached_property
    def _gram(self) -> Array:
        count = len(self.clients)
        return np.asarray(self.gram, dtype=np.float64).reshape(count, count)

    @cached_property
    def _between(self) -> Array:
        """The cosine of each pair; 0 with an update that is zero. In a mean of these each counts with length 1,
        so that a long one decides nothing."""
        lengths = np.where(self.norms > 0, self.norms, np.inf)
        return self._gram / lengths / lengths[:, None]

    def cosine(self, i: int, j: int) -> float:
        """Between two updates."""
        return float(self._between[i, j])

    def cosines(self, left: Sequence[int]) -> Array:
        """Of each of `left`, with the mean direction of the others of them."""
        among = self._between[np.ix_(left, left)]
        sums, own = among.sum(axis=1), np.diagonal(among)
        return _over_length(sums - own, sums.sum() - 2 * sums + own)

    def figures(self, clients: Collection[str]) -> dict[str, float | None]:
        """What the updates of `clients` say of the learning, for operators; None where it can't be said.

        `update_norm` of their mean by steps; `client_cosine`, the mean over all pairs; `momentum_cosine`
        between their mean and the outer momentum.
        """
        left = [i for i, client in enumerate(self.clients) if client in clients]
        pairs = self._between[np.ix_(left, left)][np.triu_indices(len(left), 1)]
        steps = np.asarray([self.steps[i] for i in left], dtype=np.float64)
        share = steps / steps.sum() if steps.sum() else np.zeros(len(left))
        square = float(share @ self._gram[np.ix_(left, left)] @ share)
        norm, along = math.sqrt(max(0.0, square)), None
        if self.heading is not None and norm > 0:
            heading = np.asarray([self.heading[i] for i in left])
            along = float(share @ (heading * self.norms[left])) / norm
        return {
            "update_norm": norm if share.any() else None,
            "client_cosine": float(pairs.mean()) if len(pairs) else None,
            "momentum_cosine": along,
        }

    def norms_over(self, left: Sequence[int]) -> Array:
        """Each norm of `left` over the median of the others; if it took more steps, over as many times more,
        since no step moves further than another. Fewer steps need not move less."""
        norms, steps = self.norms[left], np.asarray([self.steps[i] for i in left], dtype=float)
        longer = np.maximum(1.0, steps / np.median(_others(steps), axis=1))
        usual = np.median(_others(norms), axis=1) * longer
        return np.where(usual > 0, norms / np.where(usual > 0, usual, 1.0), 0.0)

    def aims(self, left: Sequence[int]) -> Array:
        """The cosine of each of `left` with the others, over the one that those have with one another; NaN
        where that is small."""
        among = self._between[np.ix_(left, left)]
        sums, own = among.sum(axis=1), np.diagonal(among)
        # [i, j]: without i, the cosine of j with the others
        without = sums[None, :] - among
        whole = (sums.sum() - 2 * sums + own)[:, None]
        each = _over_length(without - own[None, :], whole - 2 * without + own[None, :])
        agreement = np.median(each[_off_diagonal(len(left))].reshape(len(left), -1), axis=1)
        known = (agreement > MIN_AGREEMENT) & (self.norms[left] > 0)
        return np.where(known, self.cosines(left) / np.where(known, agreement, 1.0), np.nan)


def _off_diagonal(count: int) -> NDArray[np.bool_]:
    return ~np.eye(count, dtype=bool)


def _others(values: Array) -> Array:
    """[i, :]: all but value i."""
    count = len(values)
    return np.broadcast_to(values, (count, count))[_off_diagonal(count)].reshape(count, -1)


def _over_length(along: Array, square: Array) -> Array:
    """`along` over the root of `square`, a sum of cosines; 0 where that is nothing but rounding."""
    some = square > _ROUNDING
    return np.where(some, along / np.sqrt(np.where(some, square, 1.0)), 0.0)


def outliers(votes: Votes, *, min_cosine: float, norms: bool = True) -> dict[str, str]:
    """Client → why its update is not merged with the others of the round; empty if they agree well enough.

    `min_cosine` -1: nobody is left out for where it points. `norms` False: nor for how long it is.
    """
    left, out = list(range(len(votes.clients))), dict[str, str]()
    while len(left) >= MIN_CLIENTS:
        found = _longest(votes, left) if norms else None
        found = found or _most_opposed(votes, left, min_cosine)
        if min_cosine > -1:
            found = found or _most_aimless(votes, left)
        if found is None:
            return out
        worst, reason = found
        left.remove(worst)
        out[votes.clients[worst]] = reason
    if len(left) == MIN_CLIENTS - 1 and min_cosine > -1:
        out |= _turned_round(votes, left)
    return out


def undecided(votes: Votes, out: Mapping[str, str]) -> str:
    """A sentence if two clients are left that point away from each other, of which either may be wrong."""
    left = [i for i, client in enumerate(votes.clients) if client not in out]
    if (
        len(left) != MIN_CLIENTS - 1
        or (cosine := votes.cosine(left[0], left[1])) >= MIN_PAIR_COSINE
    ):
        return ""
    one, other = (votes.clients[i] for i in left)
    return f"the updates of {one} and {other} point away from each other (cosine {cosine:.2f})"


def _longest(votes: Votes, left: Sequence[int]) -> tuple[int, str] | None:
    ratios = votes.norms_over(left)
    worst = int(ratios.argmax())
    if ratios[worst] <= MAX_NORM_RATIO:
        return None
    return left[worst], (
        f"its norm {votes.norms[left[worst]]:.4g} is {ratios[worst]:.1f} times what the other "
        f"{len(left) - 1} clients of the round let expect of its steps"
    )


def _most_opposed(votes: Votes, left: Sequence[int], min_cosine: float) -> tuple[int, str] | None:
    cosines = votes.cosines(left)
    worst = int(cosines.argmin())
    if cosines[worst] >= min_cosine:
        return None
    return left[worst], (
        f"it points away from the other {len(left) - 1} clients of the round (cosine "
        f"{cosines[worst]:.2f}, and min-update-cosine is {min_cosine:g})"
    )


def _most_aimless(votes: Votes, left: Sequence[int]) -> tuple[int, str] | None:
    aims = votes.aims(left)
    if np.isnan(aims).all() or np.nanmin(aims) >= MIN_AIM:
        return None
    worst = int(np.nanargmin(aims))
    cosine = votes.cosines(left)[worst]
    return left[worst], (
        f"it has no part in the direction in which the other {len(left) - 1} clients of the round agree "
        f"(cosine {cosine:.3f})"
    )


def _turned_round(votes: Votes, pair: Sequence[int]) -> dict[str, str]:
    first, second = pair
    cosine = votes.cosine(first, second)
    if votes.heading is None or cosine >= MIN_PAIR_COSINE:
        return {}
    against = [i for i in pair if votes.heading[i] < MIN_PAIR_COSINE]
    along = [i for i in pair if votes.heading[i] > 0]
    if len(against) != 1 or len(along) != 1:
        return {}
    return {
        votes.clients[against[0]]: (
            f"it points away from the other client of the round (cosine {cosine:.2f}) and from the outer "
            f"momentum ({votes.heading[against[0]]:.2f}), along which the other one points"
        )
    }
