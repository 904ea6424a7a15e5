"""Codes beside plain numpy in float64: what they say is within their bound, and what they leave is the rest."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pilot.wire import codes
from pilot.wire.codes import BLOCK, CHUNK, CODES, Code, CodecError, Integers, Sparse, decode, encode

VARIANTS: dict[str, Code] = {
    **CODES,
    "sparse, 2 bits": Sparse(bits=2),
    "sparse, 3 bits, 17 of 4,096": Sparse(most=17, bits=3),
    "sparse, 600 of 4,096": Sparse(most=600),
}


def tensors(rows: int, columns: int, seed: int) -> Tensor:
    """Of every size that fp32 has, with rows of zeros, ties, single outliers and plain noise."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-44, 30, (rows, 1))
    values[rng.random(rows) < 0.3] = 0.0
    values[rng.random(rows) < 0.2] = rng.choice([-1.0, 0.0, 1.0])
    values[rng.random((rows, columns)) < 0.01] *= 1e6
    return torch.from_numpy(values.astype(np.float32))


shapes = st.tuples(
    st.integers(0, 40) | st.just(130), st.sampled_from([0, 1, 3, 63, 64, 77, 256, CHUNK + 1])
)


# -- the same in plain numpy -------------------------------------------------------------------------


def reference(said: bytes, code: Code, shape: tuple[int, int]) -> np.ndarray:
    """The float64 tensor of bytes that are right."""
    head = 2 * math.ceil(shape[0] / 16)
    rows = np.unpackbits(np.frombuffer(said[:head], np.uint8), bitorder="little")[: shape[0]] > 0
    flat = _values(said[head:], code, int(rows.sum()) * shape[1])
    table = np.zeros(shape)
    table[rows] = flat.reshape(int(rows.sum()), shape[1])
    return table


def _values(body: bytes, code: Code, count: int) -> np.ndarray:
    if isinstance(code, Integers):
        blocks = -(-count // BLOCK)
        scales = _bf16(body[: 2 * blocks])
        packed = np.frombuffer(body[2 * blocks :], np.uint8).reshape(blocks, 8 * code.bits)
        if code.bits == 4:
            whole = np.concatenate([packed % 16, packed // 16], axis=1).astype(float) - 8
        else:
            whole = packed.view(np.int8).astype(float)
        return (whole * scales[:, None]).reshape(-1)[:count]
    if isinstance(code, Sparse):
        return _sparse(body, code, count)
    return _bf16(body)


def _sparse(body: bytes, code: Sparse, count: int) -> np.ndarray:
    lengths = [CHUNK] * (count // CHUNK) + [count % CHUNK] * (count % CHUNK > 0)
    sent = [math.ceil(code.most * length / CHUNK) for length in lengths]
    scales, body = _bf16(body[: 2 * len(lengths)]), body[2 * len(lengths) :]
    places, values, dense = [], [], []
    for width, into in ((12, places), (code.bits, values)):
        for n in sent:
            size = math.ceil(n * width / 8)
            bits = np.unpackbits(np.frombuffer(body[:size], np.uint8), bitorder="little")
            into.append(bits[: n * width].reshape(n, width) @ (1 << np.arange(width)))
            body = body[size:]
    assert not body
    for length, scale, where, what in zip(lengths, scales, places, values, strict=True):
        chunk = np.zeros(length)
        chunk[where] = (2 * (what.astype(float) - 2 ** (code.bits - 1)) + 1) * scale
        dense.append(chunk)
    return np.concatenate(dense) if dense else np.zeros(0)


def _bf16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(float)


def by(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def check_bound(before: np.ndarray, said: np.ndarray, code: Code) -> None:
    """`before` and `said`: the values of the rows that are sent, one after another, float64."""
    if isinstance(code, Integers):
        most = 2 ** (code.bits - 1) - 1
        for ours, theirs in zip(by(before, BLOCK), by(said, BLOCK), strict=True):
            scale = np.abs(ours).max() / most * (1 + 2**-8)
            assert np.abs(ours - theirs).max() <= scale * 0.5001 + most * 1.2e-38  # below: zero
    elif isinstance(code, Sparse):
        for ours, theirs in zip(by(before, CHUNK), by(said, CHUNK), strict=True):
            sent = np.argsort(-np.abs(ours), kind="stable")[: -(-code.most * len(ours) // CHUNK)]
            smallest = np.abs(ours[sent]).min()
            assert np.count_nonzero(theirs) <= len(sent)
            chosen = theirs != 0
            scale = np.abs(ours).max() / (2**code.bits - 1) * (1 + 2**-8) + 2e-37
            assert np.abs(ours - theirs)[chosen].max(initial=0.0) <= scale * 1.0001
            assert np.abs(ours)[chosen].min(initial=math.inf) >= smallest
            assert np.abs(ours)[~chosen].max(initial=0.0) <= max(smallest, 2e-37)
    else:
        assert (np.abs(before - said) <= np.abs(before) * 2.0**-8 + 1e-40).all()


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32), name=st.sampled_from(list(VARIANTS)))
def test_every_code_keeps_its_bound_and_leaves_exactly_the_rest(
    shape: tuple[int, int], seed: int, name: str
) -> None:
    code, before = VARIANTS[name], tensors(*shape, seed)
    rest = before.clone()
    said = encode(rest, code)
    decoded = decode(said, code, shape)
    plain = reference(said.numpy().tobytes(), code, shape)
    assert decoded.dtype == torch.float32 and (decoded.numpy().astype(float) == plain).all()
    rows = before.ne(0).any(dim=1)
    assert not decoded[~rows].any()
    exact = before.numpy().astype(float)
    check_bound(exact[rows.numpy()].reshape(-1), plain[rows.numpy()].reshape(-1), code)
    assert (rest.numpy() == (exact - plain).astype(np.float32)).all()
    sent = int(rows.sum()) * shape[1]
    assert len(said) == 2 * math.ceil(shape[0] / 16) + sum(code.sections(sent))


@pytest.mark.parametrize("name", CODES)
def test_rows_of_zeros_cost_a_bit_each(name: str) -> None:
    table = torch.zeros(1600, 256)
    table[7], table[1599] = 1.0, torch.arange(256.0)
    said = encode(table, CODES[name])
    assert len(said) == 200 + sum(CODES[name].sections(512))


def test_only_the_rows_asked_for_are_sent_and_the_others_stay() -> None:
    table = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(40) % 3 == 0
    before = table.clone()
    decoded = decode(encode(table, CODES["int4"], rows=rows), CODES["int4"], (40, 64))
    assert torch.equal(table[~rows], before[~rows]) and not decoded[~rows].any()
    assert decoded[rows].any(dim=1).all()


@pytest.mark.parametrize(
    ("name", "most"),
    [("bfloat16", 2.0), ("int8", 1.032), ("int4", 0.532), ("sparse", 0.032)],
)
def test_bytes_per_value_are_what_they_are_said_to_be(name: str, most: float) -> None:
    table = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert len(encode(table, CODES[name])) / table.numel() <= most + 1e-3


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_bytes_do_not_depend_on_where_slabs_end(
    monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    table = torch.randn(300, 192, generator=torch.Generator().manual_seed(0))
    table[torch.rand(300, generator=torch.Generator().manual_seed(1)) > share] = 0
    whole, parts = table.clone(), table.clone()
    said = encode(whole, VARIANTS[name])
    monkeypatch.setattr(codes, "_SLAB", CHUNK)
    assert torch.equal(encode(parts, VARIANTS[name]), said) and torch.equal(parts, whole)
    decoded = decode(said, VARIANTS[name], table.shape)
    monkeypatch.undo()
    assert torch.equal(decode(said, VARIANTS[name], table.shape), decoded)


class NewMemory(TorchFunctionMode):
    """The largest memory that any operation returned, of all that is not `known`."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.most = max(self.most, storage.nbytes())
        return out


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("embedding", [False, True])
def test_a_tensor_is_never_held_a_second_time(name: str, embedding: bool) -> None:
    table = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))  # 16 MiB
    if embedding:
        table[::5] = 0
    with NewMemory(table) as encoding:
        said = encode(table, VARIANTS[name])
    assert encoding.most <= max(2 << 20, len(said))
    with NewMemory(said) as decoding:
        decode(said, VARIANTS[name], table.shape)
    assert decoding.most == 4 * table.numel(), "the tensor that it is, and nothing larger"


# -- what is no code of ours -------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_where_they_arrive(name: str, value: float) -> None:
    table = torch.ones(70, 64)
    table[69, 3] = value
    said = encode(table, VARIANTS[name])
    if name == "bfloat16":
        assert not torch.isfinite(decode(said, VARIANTS[name], table.shape)).all()
        return
    with pytest.raises(CodecError, match="has a scale that is negative or not finite"):
        decode(said, VARIANTS[name], table.shape)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(list(VARIANTS)),
    seed=st.integers(0, 2**32),
    cut=st.integers(-40, 40) | st.just(0),
    changes=st.integers(0, 20),
)
def test_no_bytes_crash_a_decoder(name: str, seed: int, cut: int, changes: int) -> None:
    """Right ones with some changed, cut or behind them; and any others."""
    code, shape, rng = VARIANTS[name], (30, 300), random.Random(seed)
    said = bytearray(encode(tensors(*shape, seed), code).numpy().tobytes())
    for _ in range(changes):
        said[rng.randrange(len(said))] = rng.randrange(256)
    said = said[: len(said) - cut] if cut > 0 else said + rng.randbytes(-cut)
    for data in (said, bytearray(rng.randbytes(rng.randrange(1, 400)))):
        decoded, sentence = None, "has"
        try:
            decoded = decode(torch.frombuffer(data, dtype=torch.uint8), code, shape)
        except CodecError as error:
            sentence = str(error)
        assert sentence.startswith("has") and sentence.isprintable()
        assert decoded is None or (decoded.shape, decoded.dtype) == (shape, torch.float32)


def sparse(places: list[int], length: int = CHUNK) -> Tensor:
    """The bytes of one row of that length, of which these places are sent."""
    code = Sparse(most=len(places) * CHUNK // length)
    said = encode(torch.ones(1, length), code)
    bits = "".join(f"{place:012b}"[::-1] for place in places)
    bits += "0" * (-len(bits) % 8)
    packed = [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]
    said[4 : 4 + len(packed)] = torch.tensor(packed, dtype=torch.uint8)
    return said


@pytest.mark.parametrize(
    ("places", "length"),
    [([5, 5], CHUNK), ([9, 5], CHUNK), ([0, 2048], 2048), ([2047, 4095], 2048)],
)
def test_places_out_of_range_twice_or_out_of_order_are_refused(
    places: list[int], length: int
) -> None:
    code = Sparse(most=len(places) * CHUNK // length)
    with pytest.raises(CodecError, match="has places out of range, or not in ascending order"):
        decode(sparse(places, length), code, (1, length))
    decoded = decode(sparse([3, length - 1], length), code, (1, length))
    assert decoded.nonzero()[:, 1].tolist() == [3, length - 1]


@pytest.mark.parametrize("scale", [0x7F80, 0x7FC0, 0xFF80, 0xBF80], ids=hex)
@pytest.mark.parametrize("name", ["int8", "int4", "sparse"])
def test_scales_that_are_none_are_refused(name: str, scale: int) -> None:
    said = encode(torch.ones(1, CHUNK), CODES[name])
    said[2:4] = torch.tensor([scale & 255, scale >> 8], dtype=torch.uint8)
    with pytest.raises(CodecError, match="has a scale that is negative or not finite"):
        decode(said, CODES[name], (1, CHUNK))


@pytest.mark.parametrize("name", CODES)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_made_of_them(name: str) -> None:
    said = encode(torch.ones(20, 64), CODES[name])
    with NewMemory(said) as new:
        for shape in [(20, 1 << 40), (1 << 40, 64), (20, 60), (40, 64)]:
            with pytest.raises(CodecError, match=r"^has ([0-9]+ bytes|rows beyond its 40)"):
                decode(said, CODES[name], shape)
        beyond = said.clone()
        beyond[3] |= 128  # a row that there is not
        with pytest.raises(CodecError, match="has rows beyond its 20"):
            decode(beyond, CODES[name], (20, 64))
    assert new.most < 1 << 16


def test_largest_values_are_found_as_by_sorting_them_all() -> None:
    rng = np.random.default_rng(0)
    for most in (1, 17, 64, 300, 511, 512, 600):
        chunks = rng.standard_normal((5, CHUNK)).astype(np.float32)
        chunks[0, :900] *= 100.0  # all of the largest in few groups
        places = codes._largest(torch.from_numpy(chunks), most).numpy()
        expected = np.sort(np.argsort(-np.abs(chunks), axis=1)[:, :most], axis=1)
        assert (places == expected).all()


def test_codes_differ_only_where_they_say_so() -> None:
    """Frozen: a variant is another code, and the ones that travel stay what they are."""
    assert replace(Sparse(), bits=2) != CODES["sparse"] and Integers(4) == CODES["int4"]
