"""Which faults strike when, as data: a function of the seed alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# kind → how often it comes in each cycle of the bag
KINDS = {
    "kill-worker": 3,
    "kill-clientapp": 2,
    "kill-supernode": 2,
    "kill-node": 1,  # `pilot node` around the SuperNode
    "drain-node": 1,  # SIGTERM to it: the site is preempted, and comes back
    "kill-serverapp": 1,
    "kill-superlink": 1,
    "kill-redis": 1,  # it is there again at once, empty
    "outage-redis": 1,  # it is away for a while, and comes back empty
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
# These strike the federation; all others strike one site.
FEDERATION = frozenset(
    {"kill-serverapp", "kill-superlink", "kill-redis", "outage-redis", "freeze-serverapp"}
    | {"freeze-superlink", "freeze-redis", "disk-full"}
)
_DURATION_S = (2.0, 10.0)  # of what ends by itself
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

    Kinds come out of a bag that is filled anew when it is empty, so each comes about as often as KINDS says
    however short the plan is. `kinds` in place of the bag: just these, in this order, then no more.
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
