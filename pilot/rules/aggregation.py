"""What becomes of the pseudo-gradients of a round: their mean, or something that one outlier can't move.

`mean` weights each reply by its tokens and folds them in the order given (lease order), one at a time:
memory is one model, not one per client, and the result does not depend on the order of arrival.

`trimmed-mean` and `median` work coordinate by coordinate (Yin et al., arXiv 1803.01498) and tensor by
tensor over the files on disk: memory is one tensor times clients. There every client has one vote,
whatever its tokens: weights that a client reports itself would be a way to outvote the others. The
replies of one client in one round are first folded into its vote, weighted by tokens. A single outlier
can be recognised only where three vote: with fewer clients both are the mean.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pilot.rules.agreement import Votes
from pilot.rules.lengths import Lengths, factors, squares

MIN_VOTES = 3
_TINY = 1e-300
_CHUNK = 1 << 20  # coordinates that are sorted at once

log = logging.getLogger("pilot")


@dataclass(frozen=True)
class Spilled:
    """A pseudo-gradient on disk (safetensors, fp32), made from `tokens` tokens of `client` in `steps`
    optimizer steps (which only `votes_of` asks for)."""

    client: str
    tokens: int
    path: Path
    steps: float = 0.0


def aggregate(
    replies: Sequence[Spilled],
    *,
    method: str,
    trim_fraction: float = 0.0,
    restore_lengths: bool = False,
) -> dict[str, Tensor] | None:
    """The pseudo-gradient of a round, fp32; None if there are no replies.

    `method`: "mean", "trimmed-mean" (of n votes, floor(trim_fraction * n) are cut at each end, but at least
    one, unless the fraction is 0) or "median" (of an even number: the mean of the two in the middle).
    `restore_lengths`: as `lengths.py` says; of robust methods by the same method. Replies in lease order.
    Raises ValueError for tokens that aren't positive.
    """
    votes = len({reply.client for reply in replies})
    if method != "mean" and votes >= MIN_VOTES:
        return _robust(replies, _cut(votes, method, trim_fraction), restore_lengths)
    if method != "mean" and replies:
        log.info("%d clients are too few for a %s: using their mean", votes, method)
    updates = ((float(reply.tokens), load_file(reply.path)) for reply in replies)
    return weighted_mean(updates, restore_lengths=restore_lengths)


def weighted_mean(
    updates: Iterable[tuple[float, Mapping[str, Tensor]]],
    *,
    restore_lengths: bool = False,
) -> dict[str, Tensor] | None:
    """sum(weight * update) / sum(weight), fp32, folded in the order given; None if there are none.

    `restore_lengths`: its rows as long as those of the updates, as `lengths.py` says. Raises ValueError for a
    weight that isn't positive: a mean without tokens has no meaning.
    """
    total_weight = 0.0
    total: dict[str, Tensor] = {}
    lengths = Lengths()
    for weight, update in updates:
        if not weight > 0:
            raise ValueError(f"weights must be positive, not {weight}")
        total_weight += weight
        if restore_lengths:
            lengths.add(weight, update)
        for name, tensor in update.items():
            if name in total:
                total[name].add_(tensor.float(), alpha=weight)
            else:
                total[name] = tensor.float() * weight
    if not total:
        return None
    for tensor in total.values():
        tensor.div_(total_weight)
    if restore_lengths:
        lengths.restore(total)
    return total


def votes_of(replies: Sequence[Spilled], *, momentum: Mapping[str, Tensor]) -> Votes:
    """All dot products of the clients' updates, tensor by tensor from the files: memory is one tensor of each.

    `momentum` of the outer step by name, empty before there is one.
    """
    with contextlib.ExitStack() as stack:
        by_client = _open(replies, stack)
        count = len(by_client)
        gram = torch.zeros(count, count, dtype=torch.float64)
        along = torch.zeros(count, dtype=torch.float64)
        names = next(iter(by_client.values()))[0][1].keys() if by_client else []
        for name in names:
            flat = [vote.reshape(-1).double() for vote in _votes(by_client, name)]
            for i in range(count):
                for j in range(i + 1):
                    gram[i, j] += flat[i] @ flat[j]
                if name in momentum:
                    along[i] += flat[i] @ momentum[name].reshape(-1).double()
    gram = torch.tril(gram, -1).T + gram
    size = math.sqrt(sum(float(t.double().square().sum()) for t in momentum.values()))
    norms = gram.diagonal().sqrt()
    heading = (along / (norms * size).clamp_min(_TINY)).tolist() if size > 0 else None
    taken = {c: [reply.steps for reply in replies if reply.client == c] for c in by_client}
    steps = [sum(several) / len(several) for several in taken.values()]
    return Votes(list(by_client), steps, gram.tolist(), heading)


# -- robust ------------------------------------------------------------------------------------------


def _cut(votes: int, method: str, trim_fraction: float) -> int:
    """How many of the sorted votes are left out at each end; at least one always stays."""
    most = (votes - 1) // 2
    if method == "median":
        return most
    wanted = max(1, int(trim_fraction * votes)) if trim_fraction > 0 else 0
    return min(wanted, most)


def _robust(
    replies: Sequence[Spilled], cut: int, restore_lengths: bool = False
) -> dict[str, Tensor]:
    with contextlib.ExitStack() as stack:
        by_client = _open(replies, stack)
        names = next(iter(by_client.values()))[0][1].keys()
        found = {}
        for name in names:
            votes = list(_votes(by_client, name))
            found[name] = _middle(votes, cut)
            if restore_lengths:
                usual = _middle([squares(vote) for vote in votes], cut).double()
                found[name] *= factors(found[name], usual, most=float(len(votes)))
        return found


def _open(
    replies: Sequence[Spilled], stack: contextlib.ExitStack
) -> dict[str, list[tuple[float, Any]]]:
    """Client → (tokens, open file) of each of its replies."""
    by_client: dict[str, list[tuple[float, Any]]] = {}
    for reply in replies:
        file = stack.enter_context(safe_open(reply.path, framework="pt"))
        by_client.setdefault(reply.client, []).append((float(reply.tokens), file))
    return by_client


def _votes(by_client: Mapping[str, Sequence[tuple[float, Any]]], name: str) -> Iterator[Tensor]:
    """Each client's tensor of that name."""
    for files in by_client.values():
        if len(files) == 1:
            yield files[0][1].get_tensor(name)
            continue
        mean = weighted_mean((tokens, {name: file.get_tensor(name)}) for tokens, file in files)
        assert mean is not None
        yield mean[name]


def _middle(votes: Sequence[Tensor], cut: int) -> Tensor:
    """The mean of what is left of each coordinate's sorted votes without `cut` at each end."""
    flat = [vote.reshape(-1) for vote in votes]
    middle = torch.empty_like(flat[0], dtype=torch.float32)
    for first in range(0, len(middle), _CHUNK):
        block = torch.stack([vote[first : first + _CHUNK].float() for vote in flat])
        kept = block.sort(dim=0).values[cut : len(flat) - cut]
        middle[first : first + _CHUNK] = kept.mean(dim=0)
    return middle.reshape(votes[0].shape)
