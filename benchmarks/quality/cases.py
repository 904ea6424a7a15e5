"""The scales and the experiments, by name. What they showed: docs/log.md."""

from typing import Any

from benchmarks.quality.case import Case, Scale

# lr: the best of plain training at that scale (experiment `plain`) where the log has it. A rate that is too low
# rewards whatever makes steps longer.
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="a",  # 0.2 M parameters, 20 tokens each
            depth=1,
            vocab_size=1024,
            sequence_len=128,
            batch_tokens=2048,
            total_tokens=4_014_080,
            lr=0.23,
        ),
        Scale(
            name="s",  # a quarter of it: minutes, where a takes ten
            depth=1,
            vocab_size=1024,
            sequence_len=128,
            batch_tokens=2048,
            total_tokens=1_003_520,
            lr=0.32,
        ),
        Scale(
            name="b",
            depth=2,
            vocab_size=4096,
            sequence_len=128,
            batch_tokens=4096,
            total_tokens=802_816,
            lr=0.2,
        ),
        Scale(
            name="smoke",  # seconds: whether everything works
            depth=1,
            vocab_size=512,
            sequence_len=64,
            batch_tokens=512,
            total_tokens=16_384,
            lr=0.02,
        ),
    )
}


def _outer(lr: float, momentum: float, optimizer: str = "nesterov") -> dict[str, object]:
    return {"outer-optimizer": optimizer, "outer-lr": lr, "outer-momentum": momentum}


def _by_outer(base: Case, settings: list[tuple[float, float]]) -> list[Case]:
    return [
        base.but(f"{base.name}, {lr:g}/{momentum:g}", config=_outer(lr, momentum))
        for lr, momentum in settings
    ]


def _by_wire(
    base: Case,
    lr: float,
    momentum: float,
    wires: tuple[str, ...] = ("float32", "bfloat16", "int8", "int4", "sparse"),
) -> list[Case]:
    outer = _outer(lr, momentum)
    return [
        base.but(f"{base.name}, {lr:g}/{momentum:g}, {wire}", config=outer | {"wire-up": wire})
        for wire in wires
    ]


def _by_pair(base: Case, pairs: tuple[tuple[str, str], ...]) -> list[Case]:
    """With the default outer step; a pair is `wire-up` and `wire-down`."""
    return [
        base.but(f"{base.name}, {up} up {down} down", config={"wire-up": up, "wire-down": down})
        for up, down in pairs
    ]


def _by_steps(base: Case, *steps: int) -> list[Case]:
    return [base.but(f"{base.name}, {h} steps", steps=h) for h in steps]


def _by_batch(name: str, **fields: Any) -> list[Case]:
    """Four clients: the batch of the run shared by those there; of each; and as four share it."""
    return [
        FOUR.but(f"4 clients, {name}", **fields),
        FOUR_LARGE.but(f"4 clients, batch of each, {name}", **fields),
        FOUR_LARGE.but(f"4 clients, a quarter each, {name}", batch_factor=0.25, **fields),
    ]


PLAIN = Case(name="plain")
ONE = Case(name="1 client", clients=1, steps=10)
FOUR = Case(name="4 clients", clients=4, steps=10, batch="federation")
FOUR_LARGE = Case(name="4 clients, own batch", clients=4, steps=10)
EIGHT = Case(name="8 clients", clients=8, steps=10, batch="federation")
# Blocks of 8 rounds: two by day and the others by night; all, or as many as the price allows.
SUN, PRICE = ((0, 1), (2, 3)), ((0, 1, 2, 3), (0,), (1, 2), (3,))
BLOCKS: dict[str, Any] = {"trace": SUN, "away_rounds": 8}
# Speeds 1 : 2 : 4, with a mean of 1
UNEVEN = FOUR.but("3 clients, 1:2:4", clients=3, speeds=(3 / 7, 6 / 7, 12 / 7))
RETURN = EIGHT.but("8 clients, 2 at a time", trace=((0, 1), (2, 3), (4, 5), (6, 7)), away_rounds=4)
_CODES = ("int8", "int4", "sparse")
PAIRS = (
    ("float32", "full"),
    *((code, "full") for code in _CODES),
    *(("float32", code) for code in _CODES),
    *((code, code) for code in _CODES),
    ("sparse", "int4"),
    ("int4", "sparse"),
)

EXPERIMENTS: dict[str, list[Case]] = {
    "plain": [PLAIN.but(f"plain, lr x {f:g}", lr_factor=f) for f in (0.25, 0.5, 1.0, 2.0)],
    "outer": [
        PLAIN,
        ONE,
        *_by_outer(ONE, [(0.7, 0.9), (0.7, 0.6), (1.0, 0.3)]),
        FOUR,
        *_by_outer(FOUR, [(0.7, 0.9), (0.9, 0.8), (1.4, 0.6), (1.0, 0.0)]),
    ],
    "wire": [
        PLAIN,
        *_by_wire(ONE, 0.7, 0.9),
        *_by_wire(FOUR, 0.9, 0.8),
        *_by_wire(ONE, 1.0, 0.0, wires=("sparse",)),
        *_by_wire(FOUR, 1.0, 0.0, wires=("sparse",)),
        *(
            case
            for base in (ONE, FOUR, *_by_steps(FOUR, 3), EIGHT)
            for case in _by_pair(base, PAIRS)
        ),
    ],
    "annealed": [
        PLAIN,
        *(
            case.but(f"{case.name}, momentum follows lr", momentum_follows_lr=True)
            for case in (*_by_outer(ONE, [(0.7, 0.6)]), *_by_outer(FOUR, [(0.9, 0.8)]))
        ),
    ],
    "whose-batch": [PLAIN, ONE, *_by_steps(FOUR, 3, 10, 30), *_by_steps(FOUR_LARGE, 3, 10, 30)],
    "goals": [  # what docs/quality.md says is reached, in rounds of 3 steps
        PLAIN,
        ONE,
        *_by_steps(FOUR, 3),
        FOUR.but("4 clients, 3 steps, half away at random", steps=3, away=0.5),
        *_by_steps(EIGHT, 3),
        UNEVEN.but("3 clients, 1:2:4, 3 steps", steps=3),
        FOUR.but("4 clients, 3 steps, inner average", steps=3, inner="average"),
    ],
    "absence": [
        PLAIN,
        FOUR,
        *_by_batch("half away at random", away=0.5),
        *_by_batch("by day and night", **BLOCKS),
        *_by_batch("by price", trace=PRICE, away_rounds=8),
    ],
    "joins": [
        PLAIN,
        *_by_batch("1, 2, then 4", trace=((0,), (0, 1), (0, 1, 2, 3)), away_rounds=0),
        *_by_batch("4, 2, then 1", trace=((0, 1, 2, 3), (0, 1), (0,)), away_rounds=0),
    ],
    "speeds": [
        PLAIN,
        FOUR.but("3 clients", clients=3),
        *(
            UNEVEN.but(f"3 clients, 1:2:4, shares by speed, by {weights}", weights=weights)
            for weights in ("tokens", "tokens2/steps", "steps")
        ),
        *(
            UNEVEN.but(f"3 clients, 1:2:4, {name}, by {weights}", weights=weights, **fields)
            for name, fields in (
                ("equal shares", {"shares": "equal"}),
                ("batch of each", {"batch": "client"}),
            )
            for weights in ("tokens", "equal")
        ),
    ],
    "eight": [
        PLAIN,
        FOUR,
        *_by_steps(EIGHT, 3, 10, 30),
        EIGHT.but("8 clients, batch of each", batch="client"),
        EIGHT.but("8 clients, half away at random", away=0.5),
    ],
    "inner": [
        PLAIN,
        *(
            base.but(f"{base.name}, inner {inner}", inner=inner)
            for base, choices in (
                (FOUR, ("keep", "reset", "average")),
                (RETURN, ("keep", "recent", "reset", "average")),
            )
            for inner in choices
        ),
    ],
    "stale": [
        PLAIN,
        FOUR,
        *(
            FOUR.but(f"4 clients, {late:.0%} late, {name}", late=late, late_weight=weight)
            for late in (0.1, 0.3)
            for name, weight in (("refused", 0.0), ("at half", 0.5), ("in full", 1.0))
        ),
    ],
    "delayed": [
        PLAIN,
        *(
            FOUR.but(f"4 clients, {steps} steps, {name}", steps=steps, delayed=ahead)
            for steps in (3, 10)
            for name, ahead in (
                ("at once", None),
                ("a round later", 0.0),
                ("a round later, a quarter ahead", 0.25),
                ("a round later, half ahead", 0.5),
                ("a round later, all ahead", 1.0),
            )
        ),
    ],
    "warm": [
        PLAIN,
        FOUR,
        *(
            FOUR.but(f"4 clients, first {share:.0%} in {steps} steps", phases=((share, steps),))
            for share, steps in ((0.1, 1), (0.1, 3), (0.2, 3))
        ),
        *(FOUR.but(f"4 clients, first {share:.0%} alone", alone=share) for share in (0.05, 0.1)),
        FOUR.but("4 clients, last 20% in 3 steps", phases=((0.8, 10), (1.0, 3))),
        *(
            FOUR.but(f"4 clients, {name}", phases=phases)
            for name, phases in (
                ("3 then 10 steps", ((0.3, 3), (1.0, 10))),
                ("10 then 3 steps", ((0.7, 10), (1.0, 3))),
            )
        ),
    ],
}
