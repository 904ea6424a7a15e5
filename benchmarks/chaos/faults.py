"""The plan of faults, as data: a function of the seed alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# kind → how often each filling of the bag contains it
KINDS = {
    "kill-worker": 3,
    "kill-clientapp": 2,
    "kill-supernode": 2,
    "kill-node": 1,  # `pilot node` around the SuperNode
    "drain-node": 1,  # SIGTERM to it: the site is preempted, and returns
    "kill-serverapp": 1,
    "kill-superlink": 1,
    "kill-redis": 1,  # it is back at once, empty
    "outage-redis": 1,  # it is away for a while, and returns empty
    "freeze-worker": 1,
    "freeze-clientapp": 1,
    "freeze-supernode": 1,
    "freeze-serverapp": 1,
    "freeze-superlink": 1,
    "freeze-redis": 1,
    "stall-superlink": 1,  # the line between a node and the SuperLink holds all bytes back
    "cut-superlink": 1,  # … resets its connections
    "delay-superlink": 1,
    "stall-redis": 1,  # the line between a site, or the server, and Redis
    "cut-redis": 1,
    "delay-redis": 1,
    "reply-nan": 1,
    "reply-truncate": 1,
    "reply-corrupt": 1,
    "reply-misreport": 1,
    "disk-full": 1,  # files of the server may not grow
}
# These strike the federation as a whole; all others strike one site.
FEDERATION = frozenset(
    {"kill-serverapp", "kill-superlink", "kill-redis", "outage-redis", "freeze-serverapp"}
    | {"freeze-superlink", "freeze-redis", "disk-full"}
)
_DURATION_S = (2.0, 10.0)  # of faults that end by themselves
DELAY_S = 0.3  # of each chunk of bytes on a slow line


@dataclass(frozen=True)
class Fault:
    """`target` is a site, or "server" where a line to Redis or the whole federation is meant."""

    at_s: float  # after the beginning
    kind: str
    target: str
    duration_s: float


def plan(
    seed: int,
    *,
    duration_s: float,
    every_s: float,
    sites: Sequence[str],
    kinds: Sequence[str] | None = None,
) -> list[Fault]:
    """Faults for `duration_s`, one at a random moment of each `every_s`.

    Kinds are drawn from a bag that is refilled when it is empty, so that even a short plan has about the shares
    in KINDS. With `kinds`, just these are used, in this order.
    """
    draw = random.Random(seed)
    drawn = iter(kinds) if kinds is not None else _bag(draw)
    faults = []
    for slot in range(int(duration_s / every_s)):
        kind = next(drawn, None)
        if kind is None:
            break
        at_s = (slot + draw.random()) * every_s
        target = "server" if kind in FEDERATION else draw.choice(list(sites))
        if kind.endswith("-redis") and kind not in FEDERATION:
            target = draw.choice([*sites, "server"])
        faults.append(Fault(at_s, kind, target, draw.uniform(*_DURATION_S)))
    return faults


def _bag(draw: random.Random) -> Iterator[str]:
    while True:
        kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
        draw.shuffle(kinds)
        yield from kinds
