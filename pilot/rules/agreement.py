"""Whether the updates of one round agree: how long each is beside the others, and where it points.

Norms of earlier rounds (`admission.norm_refusal`) say nothing in a run's first round, and a long update in
the right direction is another matter than a short one in the wrong. Here the clients of a round judge one
another, all at once when it is over, so that the order of arrival decides nothing. One client that is wrong
can be recognised where three take part; of two that disagree, the outer momentum tells which one turns
round.

What is an honest spread was measured: docs/log.md.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

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

    def norm(self, i: int) -> float:
        return math.sqrt(max(0.0, self.gram[i][i]))

    def cosine(self, i: int, others: Sequence[int]) -> float:
        """Between update i and the mean direction of `others`: each counts with length 1, so that a long one
        among them decides nothing."""
        lengths = [self.norm(j) for j in others]
        directions = [(j, length) for j, length in zip(others, lengths, strict=True) if length > 0]
        along = sum(self.gram[i][j] / length for j, length in directions)
        square = sum(self.gram[j][k] / (a * b) for j, a in directions for k, b in directions)
        size = self.norm(i) * math.sqrt(max(0.0, square))
        return along / size if size > 0 else 0.0

    def figures(self, clients: Collection[str]) -> dict[str, float | None]:
        """What the updates of `clients` say of the learning, for operators; None where it can't be said.

        `update_norm` of their mean by steps; `client_cosine`, the mean over all pairs; `momentum_cosine`
        between their mean and the outer momentum.
        """
        left = [i for i, client in enumerate(self.clients) if client in clients]
        pairs = [self.cosine(i, [j]) for i in left for j in left if i < j]
        total = sum(self.steps[i] for i in left)
        share = {i: self.steps[i] / total for i in left} if total else {}
        square = sum(share[i] * share[j] * self.gram[i][j] for i in share for j in share)
        norm, along = math.sqrt(max(0.0, square)), None
        if self.heading is not None and norm > 0:
            along = sum(share[i] * self.heading[i] * self.norm(i) for i in share) / norm
        return {
            "update_norm": norm if share else None,
            "client_cosine": statistics.fmean(pairs) if pairs else None,
            "momentum_cosine": along,
        }

    def norm_over(self, i: int, others: Sequence[int]) -> float:
        """Update i's norm over the median of `others`; if it took more steps, over as many times more, since no
        step moves further than another. Fewer steps need not move less."""
        usual = statistics.median(self.norm(j) for j in others)
        longer = max(1.0, self.steps[i] / statistics.median(self.steps[j] for j in others))
        return self.norm(i) / (usual * longer) if usual > 0 else 0.0

    def aim(self, i: int, others: Sequence[int]) -> float | None:
        """Update i's cosine with `others`, over the one that they have with one another; None if that is
        small."""
        among = [self.cosine(j, [k for k in others if k != j]) for j in others]
        agreement = statistics.median(among)
        if agreement <= MIN_AGREEMENT or self.norm(i) == 0:
            return None
        return self.cosine(i, others) / agreement


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
        or (cosine := votes.cosine(left[0], [left[1]])) >= MIN_PAIR_COSINE
    ):
        return ""
    one, other = (votes.clients[i] for i in left)
    return f"the updates of {one} and {other} point away from each other (cosine {cosine:.2f})"


def _longest(votes: Votes, left: Sequence[int]) -> tuple[int, str] | None:
    ratios = {i: votes.norm_over(i, [j for j in left if j != i]) for i in left}
    worst = max(ratios, key=lambda i: ratios[i])
    if ratios[worst] <= MAX_NORM_RATIO:
        return None
    return worst, (
        f"its norm {votes.norm(worst):.4g} is {ratios[worst]:.1f} times what the other "
        f"{len(left) - 1} clients of the round let expect of its steps"
    )


def _most_opposed(votes: Votes, left: Sequence[int], min_cosine: float) -> tuple[int, str] | None:
    cosines = {i: votes.cosine(i, [j for j in left if j != i]) for i in left}
    worst = min(cosines, key=lambda i: cosines[i])
    if cosines[worst] >= min_cosine:
        return None
    return worst, (
        f"it points away from the other {len(left) - 1} clients of the round (cosine "
        f"{cosines[worst]:.2f}, and min-update-cosine is {min_cosine:g})"
    )


def _most_aimless(votes: Votes, left: Sequence[int]) -> tuple[int, str] | None:
    aims = {i: votes.aim(i, [j for j in left if j != i]) for i in left}
    known = {i: aim for i, aim in aims.items() if aim is not None}
    worst = min(known, key=lambda i: known[i], default=-1)
    if worst < 0 or known[worst] >= MIN_AIM:
        return None
    cosine = votes.cosine(worst, [j for j in left if j != worst])
    return worst, (
        f"it has no part in the direction in which the other {len(left) - 1} clients of the round agree "
        f"(cosine {cosine:.3f})"
    )


def _turned_round(votes: Votes, pair: Sequence[int]) -> dict[str, str]:
    first, second = pair
    cosine = votes.cosine(first, [second])
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
