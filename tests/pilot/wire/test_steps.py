"""Steps between global models: the same bits at both ends, and nothing that the outer step wanted is
lost."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pilot.wire.codec import CodecError
from pilot.wire.messages import Part
from pilot.wire.steps import apply_step, by_number, digest_of, encode_step, numbered

SHAPES = {"matrix": (128, 96), "table": (300, 40), "vector": (96,), "small": (8, 8), "one": ()}
CODED = {"matrix", "table"}


def tensors(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


def copy(model: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.items()}


@pytest.mark.parametrize("wire", ["int8", "int4", "sparse"])
def test_mirror_has_the_servers_bits_and_the_rest_is_residual(wire: str) -> None:
    weights, residual = tensors(0), dict[str, Tensor]()
    mirror, wanted_in_all = copy(weights), copy(weights)
    for number in range(1, 6):
        change = tensors(number, 0.01)
        wanted = {name: tensor - change[name] for name, tensor in weights.items()}
        wanted_in_all = {name: tensor - change[name] for name, tensor in wanted_in_all.items()}
        before = copy(weights)
        new, residual, parts = encode_step(weights, wanted, residual.get, wire=wire)
        assert digest_of(weights) == digest_of(before), "it is needed until the round is committed"
        weights = new
        apply_step(mirror, parts)
        assert digest_of(mirror) == digest_of(weights)
        assert residual.keys() == CODED
        for name, tensor in wanted_in_all.items():
            held = weights[name] + residual.get(name, torch.zeros(()))
            torch.testing.assert_close(held, tensor, rtol=0, atol=2e-6)
    assert not torch.equal(weights["matrix"], wanted_in_all["matrix"])


def test_rows_that_did_not_change_cost_a_bit_and_their_residual_waits() -> None:
    weights, change = tensors(0), tensors(1, 0.01)
    wanted = {name: tensor - change[name] for name, tensor in weights.items()}
    weights, residual, whole = encode_step(weights, wanted, {}.get, wire="int4")
    before = residual["table"].clone()
    still = copy(weights)
    still["table"][:10] += 0.01
    moved, residual, parts = encode_step(weights, still, residual.get, wire="int4")
    assert torch.equal(moved["table"][10:], weights["table"][10:])
    assert torch.equal(residual["table"][10:], before[10:])
    sizes = {p.name: len(p.data) for p in parts}
    assert sizes["table"] < sum(len(p.data) for p in whole if p.name == "table") / 10


def test_digest_is_of_names_shapes_and_every_bit() -> None:
    model = tensors(0)
    digest = digest_of(model)
    assert digest == digest_of(dict(reversed(copy(model).items()))) and len(digest) == 64
    assert digest_of({n: t.reshape(-1) for n, t in model.items()}) != digest
    assert digest_of({n + "x": t for n, t in model.items()}) != digest
    for name in SHAPES:
        other = copy(model)
        other[name].view(-1).view(torch.int32)[-1] ^= 1
        assert digest_of(other) != digest, name


def test_steps_of_an_order_are_known_by_their_numbers() -> None:
    parts = [Part(name, "float32", (1,), bytes(4)) for name in ("a", "b.c")]
    sent = [part for number in range(3) for part in numbered(number, parts)]
    assert by_number(sent, 3) == [parts] * 3 and by_number([], 0) == []
    for name in ("3/a", "-1/a", "01/a", "a", "\u00b2/a", "9" * 5000 + "/a"):
        with pytest.raises(CodecError, match="none of the 3 steps"):
            by_number([replace(parts[0], name=name)], 3)


def _unknown(part: Part) -> Part:
    return replace(part, name="other")


@pytest.mark.parametrize(
    "spoil",
    [
        _unknown,
        lambda part: replace(part, shape=(96, 128)),
        lambda part: replace(part, shape=(2**40, 2**40)),
        lambda part: replace(part, dtype="float64"),
        lambda part: replace(part, dtype="float32", shape=(1,), data=bytes(4)),
        lambda part: replace(part, data=bytes(part.data)[:-1]),
        lambda part: replace(part, data=b"\xff" * len(part.data)),
    ],
)
def test_what_is_no_step_of_the_model_is_refused(spoil: Callable[[Part], Part]) -> None:
    weights, change = tensors(0), tensors(1)
    wanted = {name: tensor - change[name] for name, tensor in weights.items()}
    _, _, parts = encode_step(weights, wanted, {}.get, wire="int4")
    (coded,) = [part for part in parts if part.name == "matrix"]
    with pytest.raises(CodecError, match=r"\w+ has "):
        apply_step(copy(weights), [spoil(coded)])
