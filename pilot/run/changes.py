"""What a run may be continued with: its own configuration, or one in which some keys are others."""

from collections.abc import Mapping
from dataclasses import dataclass

from pilot.config import DEFAULTS, RunConfig, Scalar
from pilot.errors import PilotError

# What the model's tensors and the numbers of its rows are made of: another value fits no snapshot.
_FIXED_KEYS = frozenset(
    [
        "depth",
        "arch",
        "vocab-size",
        "sequence-len",
        "source",
        "num-shards",
        "epochs",
        "tokenizer",
        "packing",
    ]
)
# Defaults of before, and what was before there was a key: a run that was begun with these continues with them.
_OLD_DEFAULTS: Mapping[str, Scalar] = {
    "outer-lr": 0.7,
    "outer-momentum": 0.9,
    "batch-of": "client",
}
_RENAMED = {"wire-dtype": "wire-up"}  # keys of older snapshots


class ResumeError(PilotError):
    """The run on disk is not the run that was asked for."""


@dataclass(frozen=True)
class ConfigChange:
    """A key that was changed with `resume-anyway`; it holds for the rounds after `round_number`."""

    round_number: int
    key: str
    was: Scalar | None
    now: Scalar


def keeping_its_values(before: Mapping[str, Scalar], config: RunConfig) -> RunConfig:
    """`config`, but with the values of a run that was begun with the defaults of before."""
    asked = config.to_mapping()
    kept = {
        key: old
        for key, old in _OLD_DEFAULTS.items()
        if asked[key] == DEFAULTS[key] != old and before.get(key, old) == old
    }
    secrets = {"alert-url": config.alert_url}  # which `to_mapping` leaves out
    return RunConfig.from_mapping(asked | kept | secrets) if kept else config


def changes_of(before: dict[str, Scalar], config: RunConfig, *, after: int) -> list[ConfigChange]:
    """The keys in which `config` would train another model than the run's was; raises ResumeError unless
    they may be changed and the user wants that."""
    before = {_RENAMED.get(key, key): value for key, value in before.items()}
    changes = [
        ConfigChange(after, key, before.get(key, _OLD_DEFAULTS.get(key)), value)
        for key, value in config.training_keys().items()
        if before.get(key, _OLD_DEFAULTS.get(key, DEFAULTS[key]))
        != value  # unknown then: by default
    ]
    refused = [c for c in changes if c.key in _FIXED_KEYS] if config.resume_anyway else changes
    if refused:
        differing = ", ".join(f"{c.key} (was {c.was!r}, is {c.now!r})" for c in refused)
        remedy = "use the old values to resume it, or another run-name"
        if not any(change.key in _FIXED_KEYS for change in refused):
            remedy += "; resume-anyway=true continues with the new ones"
        raise ResumeError(
            f"run {config.run_name} was started with another configuration: {differing}; {remedy}"
        )
    return changes
