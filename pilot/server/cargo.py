"""What orders carry of the global model: all of it, or the steps that a client's mirror misses.

Which mirror a client has is what it said last, never a guess. Clients that need the same share one record: a
model that many ask for at once is encoded once.
"""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord

from pilot.rules.rounds import Clock
from pilot.run.state import RunState
from pilot.wire.codec import encode
from pilot.wire.messages import MAX_STEPS, Part
from pilot.wire.records import num_bytes, to_arrays
from pilot.wire.steps import FULL, numbered

_KEEP_S = 30.0  # a record, for clients that ask for the same a little later


@dataclass(frozen=True)
class Load:
    """The fields of an order about the model, and its parts as Flower's record, of `num_bytes`."""

    digest: str
    whole: bool
    steps: tuple[str, ...]
    parts: ArrayRecord
    num_bytes: int


@dataclass
class Cargo:
    """Of `state`'s model, as it is when an order is made; `borrow`: see `to_arrays`."""

    state: RunState
    clock: Clock
    borrow: bool = False
    _loads: dict[str, tuple[Load, float]] = field(default_factory=dict)  # mirror -> load, last use

    def for_mirror(self, mirror: str) -> Load:
        """For a client that says it holds the model of digest `mirror` ("": none, or none that fits)."""
        self.forget()
        digest, now_s = self.state.digest, self.clock.now_s()
        if self.state.config.wire_down == FULL or not self._leads_on(mirror):
            mirror = ""
        known = self._loads.get(mirror)
        load = known[0] if known is not None and known[0].digest == digest else None
        load = load or (self._steps_from(mirror) if mirror else None)
        if load is None and mirror:  # a step cannot be read, or the model is less
            return self.for_mirror("")
        load = load or self._load((), encode(self.state.weights), whole=True)
        self._loads[mirror] = load, now_s
        return load

    def forget(self) -> None:
        """Let go of what nobody has asked for of late, or can ask for any more."""
        since_s, digest = self.clock.now_s() - _KEEP_S, self.state.digest
        self._loads = {
            mirror: (load, used_s)
            for mirror, (load, used_s) in self._loads.items()
            if used_s >= since_s and load.digest == digest
        }

    def drop(self) -> None:
        """Let go of everything: the model is about to change, in the memory that was borrowed."""
        self._loads = {}

    def _leads_on(self, mirror: str) -> bool:
        return mirror == self.state.digest or any(s.before == mirror for s in self.state.last_steps)

    def _steps_from(self, mirror: str) -> Load | None:
        """The steps that lead on from `mirror`; None if one cannot be read, or they are more than the model."""
        if mirror == self.state.digest:
            return self._load((), [], whole=False)
        befores = [step.before for step in self.state.last_steps]
        steps = self.state.last_steps[befores.index(mirror) :]
        if len(steps) > MAX_STEPS:
            return None
        parts: list[Part] = []
        try:
            for number, step in enumerate(steps):
                parts += numbered(number, step.load())
        except (OSError, ValueError):
            return None
        whole = sum(4 * tensor.numel() for tensor in self.state.weights.values())
        if num_bytes(parts) >= whole:
            return None
        return self._load(tuple(step.before for step in steps), parts, whole=False)

    def _load(self, steps: tuple[str, ...], parts: list[Part], *, whole: bool) -> Load:
        record = to_arrays(parts, borrow=self.borrow)
        return Load(self.state.digest, whole, steps, record, num_bytes(parts))
