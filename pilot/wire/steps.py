"""Steps: from one global model to the next in few bits, to the same bits on the server and in every mirror.

The global model is what clients hold. The server wants another one; it encodes the difference and what the code
could not say of the one before (its *residual*), decodes that itself, and what it adds to its own model is what
every client adds to its own. Adding is elementwise in fp32 on the CPU and nothing is fused, so all machines
agree, whatever the code; a digest of all tensors proves it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from pilot.wire.codec import DECAY, CodecError, decode, encode, form_of
from pilot.wire.messages import Part

FULL = "full"  # the `wire-down` that knows no steps
_HASHERS = 4  # hashing leaves Python's lock to others, and is as fast as memory with a few of them
_BETWEEN = "/"  # a step's number and a tensor's name; no tensor's name has one

Tensors = dict[str, Tensor]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of names, shapes and values of fp32 `tensors` on the CPU, whatever their order."""
    names = sorted(tensors)
    with ThreadPoolExecutor(_HASHERS) as pool:
        found = pool.map(lambda name: _sha256(tensors[name]), names)
        whole = hashlib.sha256()
        for name, values in zip(names, found, strict=True):
            whole.update(f"{name}\0{list(tensors[name].shape)}\0".encode() + values)
    return whole.hexdigest()


def _sha256(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).numpy().data).digest()


class StepEncoder:
    """Encodes a step tensor by tensor, as the weights move (`rules/outer.py`); `parts` are what it has said.

    `residual` gives what the step before could not say, by name. A row that is as it was is not sent, and its
    residual waits. Nothing decays: what the outer step wanted comes in the end.
    """

    def __init__(self, residual: Callable[[str], Tensor | None], *, wire: str) -> None:
        self._residual, self._wire = residual, wire
        self._said: dict[str, Part] = {}

    @property
    def parts(self) -> list[Part]:
        return [
            self._said[name] for name in sorted(self._said)
        ]  # in any order a resumed run has them

    def leaves_residual(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape` travels in a form that is not exact."""
        return form_of(self._wire, shape) in DECAY

    def say(self, name: str, before: Tensor, weight: Tensor) -> Tensor:
        """`weight` is what the outer step wants and becomes what clients get who hold `before`; all fp32.

        Returns the new residual. The memory of both is used: beside them there is one more tensor.
        """
        # the part of an exact form is a view of what it says
        left = weight.sub_(before) if self.leaves_residual(weight.shape) else weight - before
        (part,) = encode({name: left}, wire=self._wire, rest=self._residual, decay=1.0)
        change = decode([part], shapes={name: before.shape})[name]
        before.add_(change)
        rest = change.copy_(left)
        weight.copy_(before)
        self._said[name] = part
        return rest


def encode_step(
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    residual: Callable[[str], Tensor | None],
    *,
    wire: str,
) -> tuple[Tensors, Tensors, list[Part]]:
    """(new weights, new residual, parts) of a step from `weights` towards `wanted` and the last `residual`.

    All fp32, by name; `weights` are unchanged, the memory of `wanted` becomes the new weights.
    """
    encoder, left = StepEncoder(residual, wire=wire), {}
    for name, tensor in wanted.items():
        rest = encoder.say(name, weights[name].clone(), tensor)
        if encoder.leaves_residual(tensor.shape):
            left[name] = rest
    return dict(wanted), left, encoder.parts


def apply_step(weights: Mapping[str, Tensor], parts: Iterable[Part]) -> None:
    """Take the step of `parts` in place, tensor by tensor. Raises CodecError for what is no step of `weights`,
    some of which may have been moved by then."""
    for part in parts:
        if part.name not in weights:
            raise CodecError(f"{part.name} has no place in the model")
        tensor = weights[part.name]
        change = decode([part], shapes={part.name: tensor.shape})[part.name]
        if change.shape != tensor.shape:
            raise CodecError(f"{part.name} has shape {tuple(change.shape)}, not that of the model")
        tensor.add_(change)


def numbered(number: int, parts: Iterable[Part]) -> Iterator[Part]:
    """The parts of the step `number` of an order."""
    for part in parts:
        yield Part(f"{number}{_BETWEEN}{part.name}", part.dtype, part.shape, part.data)


def by_number(parts: Iterable[Part], count: int) -> list[list[Part]]:
    """The parts of each of the `count` steps of an order. Raises CodecError for a part of none of them."""
    steps: dict[str, list[Part]] = {str(number): [] for number in range(count)}
    for part in parts:
        number, _, name = part.name.partition(_BETWEEN)
        if number not in steps:
            raise CodecError(f"{part.name[:99]} belongs to none of the {count} steps of its order")
        steps[number].append(Part(name, part.dtype, part.shape, part.data))
    return list(steps.values())
