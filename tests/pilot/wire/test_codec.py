"""Tensors on the wire: fp32 to the bit, bf16 to its rounding, and nothing made of bytes that don't fit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pilot.wire.codec import CodecError, decode, encode
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


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def test_float32_is_lossless_to_the_last_bit_of_a_nan() -> None:
    decoded = decode(encode(TENSORS))
    assert list(decoded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert decoded[name].shape == tensor.shape and decoded[name].dtype == torch.float32
        assert torch.equal(bits(decoded[name]), bits(tensor)), name


def test_bfloat16_rounds_to_nearest_even_and_halves_the_bytes() -> None:
    values = {"x": torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e3}
    parts = encode(values, dtype="bfloat16")
    assert len(parts[0].data) == 2000 and parts[0].dtype == "bfloat16"
    decoded = decode(parts)["x"]
    assert decoded.dtype == torch.float32 and torch.equal(decoded, values["x"].bfloat16().float())
    assert ((decoded - values["x"]).abs() <= values["x"].abs() * 2.0**-8).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty_and_scalar_tensors_travel(dtype: str) -> None:
    decoded = decode(encode(TENSORS, dtype=dtype))
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
