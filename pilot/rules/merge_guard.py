"""Whether a merge made the model much worse, and who may have done it.

Each rule of admission looks for one thing. This one needs to know nothing of what a client may do: a
round's clients score the model that the round before merged, and if half of them find it much worse than it
was, the merge is taken back. What each client has scored is compared with the same rows of earlier
versions, so one of three that lies about its figure takes nothing back.

Who did it is found by halves: after a merge is taken back, half of its clients get no work until a merge
without them has been scored. Whoever was in a merge that was good is cleared.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from typing import Any

from pilot.rules.validation import Figure, bpb
from pilot.segment import Score

# A version is compared with the best of this many before it, so that no slow ruin passes either.
VERSIONS = 5


class Verdict(Enum):
    """What the figure of a version says of its merge."""

    GOOD = auto()
    BAD = auto()
    UNKNOWN = auto()  # too few rows were scored, or others than before


@dataclass
class GuardBooks:
    """What the guard remembers between rounds; a snapshot keeps it.

    `trusted_round`: the last round whose model has been scored and is not worse; what a merge is taken back to.
    `since`: clients of which replies were merged since then; none: the model is still the same. `versions`:
    what clients scored of the last versions that were good, oldest first. `taken_back`: merges taken back
    since the last good one. `suspects`: clients of which one has spoilt a merge; `aside`: those of them
    that get no work for now.
    """

    trusted_round: int = 0
    since: list[str] = field(default_factory=list)
    versions: list[list[Score]] = field(default_factory=list)
    taken_back: int = 0
    suspects: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)

    def merged(self, clients: Collection[str]) -> None:
        """A round has merged replies of `clients`."""
        self.since = sorted({*self.since, *clients})

    def judge(self, figure: Figure, *, wanted_rows: int, max_ratio: float) -> Verdict:
        """The verdict on the version that `figure` is of; `max_ratio` 0: every version is good."""
        if 2 * figure.rows < wanted_rows:
            return Verdict.UNKNOWN
        if not self.since:
            return Verdict.GOOD
        ratios = [self._ratio(scores) for scores in figure.by_client.values()]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known and self.versions:
            return Verdict.UNKNOWN
        worse = sum(ratio > max_ratio for ratio in known)
        return Verdict.BAD if max_ratio and worse and 2 * worse >= len(known) else Verdict.GOOD

    def _ratio(self, scores: Sequence[Score]) -> float | None:
        """A client's bpb over the least one that earlier versions had on the same rows; None if none had
        any."""
        now = {score.piece: score for score in scores}
        ratios = []
        for version in self.versions:
            both = [score for score in version if score.piece in now]
            before, after = bpb(both), bpb([now[score.piece] for score in both])
            if before and after:
                ratios.append(after / before)
        return max(ratios, default=None)

    def was_good(self, round_number: int, figure: Figure) -> None:
        """The version of `round_number`, which `figure` is of, is not worse than those before."""
        clients, self.since = self.since, []
        self.trusted_round = round_number
        if not clients and self.versions:  # the same model as before
            return
        self.taken_back = 0
        scores = {score.piece: score for theirs in figure.by_client.values() for score in theirs}
        scores |= {score.piece: score for score in figure.scores}
        self.versions = [*self.versions, sorted(scores.values())][-VERSIONS:]
        left = [name for name in self.suspects if name not in clients]
        if left == self.suspects:  # none of them took part: now the others may
            self.aside = [name for name in left if name not in self.aside]
        else:
            self._suspect(left)

    def was_bad(self, round_number: int) -> str:
        """The merges since the last good version are taken back by round `round_number`.

        Returns the client that spoilt them, "" if that is not known yet.
        """
        clients, self.since = self.since, []
        self.trusted_round = round_number
        self.taken_back += 1
        among = [name for name in self.suspects if name in clients] or sorted(set(clients))
        if len(among) == 1:
            self._suspect([])
            return among[0]
        self._suspect(among)
        return ""

    def _suspect(self, names: Sequence[str]) -> None:
        self.suspects = sorted(names)
        self.aside = self.suspects[(len(names) + 1) // 2 :]

    @property
    def improving(self) -> bool:
        """Whether the last good version is better than the one before: then no client has turned the outer
        momentum round."""
        values = [bpb(version) for version in self.versions[-2:]]
        return len(values) == 2 and (values[1] or 0.0) < (values[0] or 0.0)

    def to_json(self) -> dict[str, Any]:
        versions = [[score.to_list() for score in version] for version in self.versions]
        return asdict(self) | {"versions": versions}

    @staticmethod
    def from_json(values: Mapping[str, Any] | None, *, round_number: int) -> "GuardBooks":
        """The inverse of `to_json`; None of a snapshot of before there was a guard, after `round_number`
        rounds."""
        if values is None:
            return GuardBooks(trusted_round=round_number)
        versions = [[Score.from_list(score) for score in version] for version in values["versions"]]
        known: dict[str, Any] = {**values, "versions": versions}
        return GuardBooks(**known)
