"""Tensors on the wire: fp32 to the bit, bf16 to its rounding, and nothing made of bytes that don't fit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pilot.wire.codec import DECAY, CodecError, decode, encode, form_of
from pilot.wire.messages import Part

BITS = [0x7FC00001, 0xFFC0DEAD - (1 << 32), 0x7F800001, 0x7F800000, 0, -(1 << 31), 1]
TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "slice": torch.arange(10.0)[::3],
    "scalar": torch.tensor(-0.0),
    "empty": torch.empty(0),
    "empty matrix": torch.empty(3, 0),
    "bits": torch.tensor(BITS, dtype=torch.int32).view(torch.float32),  # NaN payloads, subnormals
}


WIRES = ["float32", "bfloat16", "int8", "int4", "sparse"]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def test_float32_is_lossless_to_the_last_bit_of_a_nan() -> None:
    decoded = decode(encode(TENSORS))
    assert list(decoded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert decoded[name].shape == tensor.shape and decoded[name].dtype == torch.float32
        assert torch.equal(bits(decoded[name]), bits(tensor)), name


def test_bfloat16_rounds_to_nearest_even_and_halves_the_bytes() -> None:
    values = {"x": torch.randn(100, 64, generator=torch.Generator().manual_seed(0)) * 1e3}
    before = values["x"].clone()
    parts = encode(values, wire="bfloat16")
    assert len(parts[0].data) == 14 + 2 * 6400 and parts[0].dtype == "bfloat16"
    decoded = decode(parts, shapes={"x": (100, 64)})["x"]
    assert decoded.dtype == torch.float32 and torch.equal(decoded, before.bfloat16().float())
    assert ((decoded - before).abs() <= before.abs() * 2.0**-8).all()


@pytest.mark.parametrize("wire", WIRES)
def test_vectors_and_small_tensors_travel_as_they_are(wire: str) -> None:
    tensors = TENSORS | {"vector": torch.randn(10_000), "small": torch.randn(63, 65)}
    parts = encode(tensors, wire=wire)
    assert {part.dtype for part in parts} == {"float32"}
    assert {form_of(wire, part.shape) for part in parts} == {"float32"}
    decoded = decode(parts, shapes={name: t.shape for name, t in tensors.items()})
    for name, tensor in tensors.items():
        assert torch.equal(bits(decoded[name]), bits(tensor)), name


@pytest.mark.parametrize("wire", WIRES)
def test_empty_and_scalar_tensors_travel(wire: str) -> None:
    decoded = decode(encode(TENSORS, wire=wire))
    for name in ("scalar", "empty", "empty matrix"):
        assert decoded[name].shape == TENSORS[name].shape


def test_bf16_tensors_of_a_model_become_fp32_on_the_wire() -> None:
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(decode(encode({"t": table}))["t"], table.float())


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decoded_tensors_are_writable_whatever_holds_the_bytes(kind: type) -> None:
    part = encode({"x": torch.ones(3)})[0]
    data = kind(bytes(part.data))
    tensor = decode([replace(part, data=data)])["x"]
    tensor.add_(1)
    assert tensor.tolist() == [2.0, 2.0, 2.0]


def test_encoding_doesnt_change_a_tensor_that_needs_gradients() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert torch.equal(decode(encode({"x": tensor}))["x"], torch.ones(3))


@pytest.mark.parametrize(
    "bad",
    [
        Part("x", "float32", (2, 2), b"\0" * 15),
        Part("x", "float32", (2, 2), b"\0" * 17),
        Part("x", "float32", (2, 2), b""),
        Part("x", "bfloat16", (2, 2), b"\0" * 16),
        Part("x", "int4", (64, 64), b"\0" * 8),
        Part("x", "float32", (), b""),
        Part("x", "float32", (-1, -4), b"\0" * 16),
        Part("x", "float32", (1 << 62, 4), b"\0" * 16),
        Part("x", "float32", (0, 1 << 62, 4), b""),
        Part("x", "float32", (1 << 62, 0, 1 << 62), b""),
        Part("x", "float64", (2,), b"\0" * 16),
        Part("x", "object", (1,), b"\0"),
        Part("x", "", (1,), b"\0" * 4),
    ],
    ids=str,
)
def test_bytes_that_are_not_what_their_header_says_are_refused(bad: Part) -> None:
    with pytest.raises(CodecError, match="x has"):
        decode([bad])


def test_name_that_comes_twice_is_refused() -> None:
    part = Part("x", "float32", (1,), b"\0" * 4)
    with pytest.raises(CodecError, match="twice"):
        decode([part, part])


# -- updates ---------------------------------------------------------------------------------------

SHAPES = {"x": (64, 64)}


@pytest.mark.parametrize("wire", WIRES[1:])
def test_coded_parts_are_taken_only_for_a_tensor_that_is_expected(wire: str) -> None:
    (part,) = encode({"x": torch.ones(64, 64)}, wire=wire)
    assert decode([part], shapes=SHAPES)["x"].shape == (64, 64)
    with pytest.raises(CodecError, match="x has unknown wire form"):
        decode([part])
    with pytest.raises(CodecError, match=r"x has shape \(64, 64\), not \(64, 65\)"):
        decode([part], shapes={"x": (64, 65)})
    with pytest.raises(CodecError, match="x has no place in the model"):
        decode([part], shapes={"y": (64, 64)})
    with pytest.raises(CodecError, match=r"x has \d+ bytes, not"):
        decode([replace(part, data=bytes(part.data)[:-1])], shapes=SHAPES)
    # what a hostile header would have us make: none of it is made
    for shape in [(1 << 20, 1 << 20), (64, 1 << 40)]:
        with pytest.raises(CodecError, match="x has shape"):
            decode([replace(part, shape=shape)], shapes=SHAPES)


@pytest.mark.parametrize("wire", DECAY)
def test_what_was_said_and_the_rest_add_up_to_all_updates(wire: str) -> None:
    """With nothing forgotten; sparse forgets a twentieth of what waits."""
    generator = torch.Generator().manual_seed(0)
    said, all_updates = torch.zeros(64, 64), torch.zeros(64, 64)
    rest: dict[str, Tensor] = {}
    for _ in range(20):
        update = {"x": torch.randn(64, 64, generator=generator)}
        all_updates.add_(update["x"])
        if rest:
            all_updates.sub_((1 - DECAY[wire]) * rest["x"])
        said.add_(decode(encode(update, wire=wire, rest=rest.get), shapes=SHAPES)["x"])
        rest = update
    torch.testing.assert_close(said + rest["x"], all_updates, rtol=0, atol=1e-4)
    assert bool(rest["x"].any())


@pytest.mark.parametrize("wire", DECAY)
def test_rest_of_a_row_waits_until_the_row_is_trained_again(wire: str) -> None:
    update, rest = torch.ones(64, 64), torch.full((64, 64), 0.5)
    update[::2] = 0
    left = {"x": update}
    decoded = decode(encode(left, wire=wire, rest={"x": rest}.get), shapes=SHAPES)["x"]
    assert not decoded[::2].any() and decoded[1::2].any()
    assert torch.equal(left["x"][::2], DECAY[wire] * rest[::2])


def test_rest_of_another_shape_is_not_that_of_this_model() -> None:
    update = {"x": torch.ones(64, 64)}
    decoded = decode(encode(update, wire="int8", rest={"x": torch.ones(1)}.get), shapes=SHAPES)
    torch.testing.assert_close(decoded["x"], torch.ones(64, 64), rtol=1e-2, atol=0)
