"""The scales and the experiments, by name. What they showed: docs/log.md."""

from benchmarks.quality.laboratory import Case, Scale

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


PLAIN = Case(name="plain")
ONE = Case(name="1 client", clients=1, steps=10)
FOUR = Case(name="4 clients", clients=4, steps=10, batch="federation")
FOUR_LARGE = Case(name="4 clients, own batch", clients=4, steps=10)
EIGHT = Case(name="8 clients", clients=8, steps=10, batch="federation")
AWAY = FOUR.but("4 clients, half away", away=0.5, away_rounds=4)

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
    ],
    "annealed": [
        PLAIN,
        *(
            case.but(f"{case.name}, momentum follows lr", momentum_follows_lr=True)
            for case in (*_by_outer(ONE, [(0.7, 0.6)]), *_by_outer(FOUR, [(0.9, 0.8)]))
        ),
    ],
    "rounds": [PLAIN, *(FOUR.but(f"4 clients, {h} steps", steps=h) for h in (3, 10, 30))],
    "batch": [PLAIN, FOUR, FOUR_LARGE, EIGHT],
    "inner": [PLAIN, FOUR, *(FOUR.but(f"4 clients, {i}", inner=i) for i in ("reset", "average"))],
    "volatile": [PLAIN, FOUR, FOUR.but("4 clients, 1:2:4:1", speeds=(1, 2, 4, 1)), AWAY],
}
