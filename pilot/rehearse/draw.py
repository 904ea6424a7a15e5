"""Traces drawn from distributions: who is there when, and what goes wrong. Each is a function of its seed."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence

from pilot.rehearse.trace import REDIS, SERVER, Happening


def weibull(
    clients: Sequence[str],
    *,
    hours: float,
    up_h: float,
    down_h: float,
    seed: int | str,
    shape: float = 1.0,
    notice_s: float = 0.0,
) -> list[Happening]:
    """Machines that come and go: Weibull up and down times with these means, in hours, and this shape.

    `shape` 1: exponential, as where losses know nothing of one another; below 1: many short ones, as spot
    capacity has them. `notice_s`: how long before its end a machine hears of it (0: never).
    """
    rng, scale = random.Random(seed), math.gamma(1 + 1 / shape)
    found = []
    for client in clients:
        # at a random moment of its life: it is up with the share of time that it is up
        up, at_h = rng.random() < up_h / (up_h + down_h), 0.0
        while at_h < hours:
            found.append((at_h, client, up))
            at_h += rng.weibullvariate((up_h if up else down_h) / scale, shape)
            up = not up
    return sorted(_ups_and_downs(found, notice_s))


def windows(
    client: str, times_h: Iterable[tuple[float, float]], *, notice_s: float = 0.0
) -> list[Happening]:
    """A machine that is up from `first` to `end`, in hours, of each of `times_h`."""
    spans = [
        (at_h, client, up) for pair in times_h for at_h, up in zip(pair, (True, False), strict=True)
    ]
    return sorted(_ups_and_downs(spans, notice_s))


def solar(days: float, *, noon_h: float = 12.0, hours: float = 8.0) -> list[tuple[float, float]]:
    """The windows in which the sun is high enough: `hours` around `noon_h` (UTC), each day."""
    return [
        (max(0.0, 24 * day + noon_h - hours / 2), 24 * day + noon_h + hours / 2)
        for day in range(math.ceil(days))
    ]


def _ups_and_downs(
    spans: Iterable[tuple[float, str, bool]], notice_s: float
) -> Iterator[Happening]:
    for at_h, client, up in spans:
        at_s = 3600 * at_h
        if not up and notice_s > 0 and at_s > notice_s:
            yield Happening(at_s - notice_s, client, "notice", notice_s)
        if up or at_s > 0:
            yield Happening(at_s, client, "up" if up else "down")


def faults(
    clients: Sequence[str], *, seconds: float, every_s: float, seed: int, server: bool = True
) -> list[Happening]:
    """Something goes wrong every `every_s` seconds in the mean: every kind of it, to anybody, for any time.

    What was killed comes back. At the end all are up.
    """
    rng = random.Random(seed)
    found = [Happening(rng.uniform(0, 5), client, "up") for client in clients]
    at_s = 0.0
    of_clients = ("down", "notice", "freeze", "cut", "slow", "late", "crash", "break")
    of_replies = ("lie", "stale", "double")
    of_server = ("kill", "crash", "freeze", "jump") if server else ()
    kinds = [*of_clients, *of_replies, "away", *of_server]
    while (at_s := at_s + rng.expovariate(1 / every_s)) < seconds:
        place, client, lasts_s = (
            rng.randrange(len(kinds)),
            rng.choice(list(clients)),
            rng.expovariate(1 / 20),
        )
        kind = kinds[place]
        if place >= len(of_clients) + len(of_replies):
            found.append(Happening(at_s, REDIS if kind == "away" else SERVER, kind, lasts_s))
        elif kind in ("down", "notice"):
            found.append(Happening(at_s, client, kind, lasts_s))
            found.append(Happening(at_s + lasts_s + rng.uniform(0, 90), client, "up"))
        else:
            found.append(Happening(at_s, client, kind, lasts_s))
    found += [Happening(seconds, client, "up") for client in clients]
    return sorted(found)


def maintenance(
    client: str, *, hours: float, every_h: float, lasts_h: float, notice_s: float, first_h: float
) -> list[Happening]:
    """A machine that is away for `lasts_h` hours every `every_h`, from `first_h` on, and says so before."""
    starts_h = [0.0]
    ends_h = []
    at_h = first_h
    while at_h < hours:
        ends_h.append(at_h)
        starts_h.append(at_h + lasts_h)
        at_h += every_h
    ends_h.append(hours + every_h)  # after all that is asked for
    return windows(client, zip(starts_h, ends_h, strict=True), notice_s=notice_s)
