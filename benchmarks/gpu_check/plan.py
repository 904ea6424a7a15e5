"""The checks, in order: which function, with what options, how long it may take, what runs beside it."""

import itertools
from dataclasses import dataclass, field

# benches of the training step that `--variants` repeats
_VARIED = ("d12-b32", "d20-b32")


@dataclass(frozen=True, kw_only=True)
class Check:
    """`limit_s` ends it; checks of one `group` run at the same time, those of "" alone.

    `cost_s` is what it takes on one H100: a check that no longer fits into the call's time is left out.
    """

    name: str
    function: str  # module:function of this package
    limit_s: float
    cost_s: float
    group: str = ""
    options: dict[str, str] = field(default_factory=dict)


def _step(name: str, *, cost_s: float = 20, **options: str) -> Check:
    return Check(
        name=name,
        function="step:check",
        limit_s=90,
        cost_s=cost_s,
        options={"bench": name} | options,
    )


# What matters most comes first: where eight minutes are too few, it is the last steps that are left out.
_CHECKS = (
    Check(name="facts", function="facts:check", limit_s=60, cost_s=12),
    # correctness, all at once: these are bound by compilers and imports, not by the GPU
    Check(name="data", function="data:check", limit_s=90, cost_s=30, group="exact"),
    Check(name="head", function="head:check", limit_s=90, cost_s=30, group="exact"),
    Check(name="fp8", function="fp8:check", limit_s=90, cost_s=20, group="exact"),
    Check(name="attention", function="attention:check", limit_s=120, cost_s=45, group="exact"),
    Check(name="optimizer", function="optimizer:check", limit_s=90, cost_s=30, group="exact"),
    Check(name="nccl", function="nccl:check", limit_s=60, cost_s=20, group="exact"),
    Check(name="losses", function="losses:check", limit_s=150, cost_s=60, group="exact"),
    Check(name="blocks", function="blocks:check", limit_s=150, cost_s=60, group="exact"),
    # runs and their processes, all at once: what they measure are seconds, not milliseconds
    Check(name="federation", function="federation:check", limit_s=210, cost_s=60, group="runs"),
    Check(name="groups", function="groups:check", limit_s=210, cost_s=60, group="runs"),
    Check(name="large-message", function="groups:large", limit_s=150, cost_s=50, group="runs"),
    Check(name="stops", function="stops:check", limit_s=150, cost_s=60, group="runs"),
    Check(name="scripts", function="command_lines:check", limit_s=150, cost_s=60, group="runs"),
    # speed, alone
    Check(name="kernels", function="kernels:check", limit_s=120, cost_s=45),
    _step("d20-b32", depth="20", rows="32", step_tokens="524288", steps="2", cost_s=45),
    _step(
        "d20-b32-fp8", depth="20", rows="32", step_tokens="524288", steps="2", fp8="on", cost_s=45
    ),
    _step("d12-b32", depth="12", rows="32", cost_s=15),
    _step("d20-b8", depth="20", rows="8", profile="1"),
    # memory that a step has not, alone, since it takes all there is
    Check(name="memory", function="stops:memory", limit_s=60, cost_s=25),
    Check(name="optimizer-speed", function="optimizer:speed", limit_s=60, cost_s=15),
    _step("d20-b8-eager", depth="20", rows="8", compile="off"),
    _step("d20-b8-modern", depth="20", rows="8", arch="modern", cost_s=50),
)


def checks(only: list[str], variants: list[dict[str, str]]) -> list[Check]:
    """Those named in `only` (empty: all), the training step once a variant.

    Raises ValueError for an unknown name.
    """
    known = [check.name for check in _CHECKS]
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"no check {', '.join(unknown)}: choose from {', '.join(known)}")
    chosen = [check for check in _CHECKS if not only or check.name in only]
    return [one for check in chosen for one in _varied(check, variants)]


def _varied(check: Check, variants: list[dict[str, str]]) -> list[Check]:
    if not variants or check.name not in _VARIED:
        return [check]
    return [
        Check(
            name=f"{check.name} {','.join(f'{k}={v}' for k, v in variant.items())}",
            function=check.function,
            limit_s=check.limit_s,
            cost_s=check.cost_s,
            options=check.options | variant,
        )
        for variant in variants
    ]


def parse_variants(words: list[str]) -> list[dict[str, str]]:
    """`head=eager,fused sdpa=flash,cudnn` as combinations: the first of each, …, the last of each.

    Not the full product: what one change brings is seen from neighbours, and a GPU's minutes count.
    """
    pairs = [word.partition("=") for word in words]
    if bad := [word for word, (_, equals, _) in zip(words, pairs, strict=True) if not equals]:
        raise ValueError(f"{bad[0]} is no variant: write it as key=value,value")
    keys = [key for key, _, _ in pairs]
    values = [text.split(",") for _, _, text in pairs]
    longest = itertools.zip_longest(*values)
    return [
        {
            key: value if value is not None else options[-1]
            for key, value, options in zip(keys, row, values, strict=True)
        }
        for row in longest
    ]
