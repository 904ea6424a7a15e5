"""Files of tensors in pieces: the bits and the hash of what safetensors itself reads and writes."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilot.tensor_file import TensorFile, TensorWriter, pieces, rows_of, write_tensors

SHAPES = {"wide": (3, 70_000), "long": (700, 2, 500), "vector": (9,), "scalar": (), "empty": (0, 4)}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_written_is_what_safetensors_reads_and_what_it_hashes_to(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert write_tensors(path, tensors()) == sha256(path)
    torch.testing.assert_close(load_file(path), tensors(), rtol=0, atol=0)


def test_a_file_of_safetensors_is_read_by_name_and_by_rows(tmp_path: Path) -> None:
    path, expected = tmp_path / "x.safetensors", tensors()
    save_file(expected, path)
    found = TensorFile(path)
    path.unlink()  # which an open file survives
    torch.testing.assert_close(dict(found), expected, rtol=0, atol=0)
    assert found.shapes == SHAPES and len(found) == len(SHAPES)
    table = expected["long"].reshape(1400, 500)
    for source in (found, expected):
        assert torch.equal(rows_of(source, "long", 5, 9), table[5:9])
        assert torch.equal(rows_of(source, "vector", 0, 1), expected["vector"])
        assert torch.equal(rows_of(source, "scalar", 0, 1), expected["scalar"])


def test_pieces_are_all_rows_once_and_no_larger_than_asked_for() -> None:
    for shape in SHAPES.values():
        found = list(pieces(shape, values=1 << 17))
        rows = 1 if len(shape) < 2 else torch.empty(shape).flatten(0, -2).shape[0]
        assert [row for first, end in found for row in range(first, end)] == list(range(rows))
    assert max(end - first for first, end in pieces((10_000, 64), values=1 << 17)) == 2048


def test_rows_written_in_any_order_give_the_same_file(tmp_path: Path) -> None:
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    digest = write_tensors(whole, tensors())
    writer = TensorWriter(mixed, SHAPES)
    for name in reversed(SHAPES):
        for first, end in reversed(list(pieces(SHAPES[name], values=1 << 16))):
            writer.write(name, rows_of(tensors(), name, first, end), first)
    assert writer.close() == digest and whole.read_bytes() == mixed.read_bytes()


def test_a_file_that_was_read_is_copied_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert write_tensors(first, tensors()) == write_tensors(second, TensorFile(first))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 16, b"\2" + b"\0" * 7 + b"{}"[:1]])
def test_what_is_no_file_of_tensors_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no file of tensors"):
        TensorFile(path)


def test_a_file_that_was_cut_off_or_holds_other_numbers_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, tensors())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="does not hold"):
        TensorFile(path)
    save_file({"w": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match="does not hold w in fp32"):
        TensorFile(path)
    with pytest.raises(TypeError, match="only fp32"):
        write_tensors(path, {"w": torch.zeros(2, dtype=torch.bfloat16)})
