"""GPUs as a process sees them, on machines without: fake drivers, fake memory, fake cards."""

import gc
from pathlib import Path

import pytest
import torch

from nanochat import common, gpus
from nanochat.common import autodetect_device_type, check_device_type
from nanochat.errors import UserError
from nanochat.gpus import (
    capability_of,
    device_rows,
    driver_version,
    mfu,
    peak_flops,
    peak_flops_of,
    prepare_device,
    rows_by_memory,
    settle_garbage,
    unusable_gpus,
)

_MODULE = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\n"
)


@pytest.fixture
def old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs and a driver from 2023, which this torch cannot use."""
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (devices / name).touch()
    driver = tmp_path / "version"
    driver.write_text(_MODULE, encoding="utf-8")
    monkeypatch.setattr(gpus, "_DEVICES", devices)
    monkeypatch.setattr(gpus, "_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return devices


@pytest.mark.usefixtures("old_driver")
def test_gpus_that_torch_cannot_use_are_an_error_with_the_driver_and_the_cure() -> None:
    for ask in (autodetect_device_type, lambda: check_device_type("cuda")):
        with pytest.raises(UserError) as caught:
            ask()
        sentence = str(caught.value)
        assert "535.161.08" in sentence
        assert "CUDA 13.2" in sentence
        assert "driver 580" in sentence
        assert '"cpu"' in sentence


@pytest.mark.usefixtures("old_driver")
def test_the_cpu_can_still_be_asked_for() -> None:
    assert check_device_type("cpu") == "cpu"


@pytest.mark.usefixtures("old_driver")
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_environment_hides_are_none(
    hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert unusable_gpus() == ""
    assert autodetect_device_type() in ("cpu", "mps")


def test_a_machine_without_gpus_trains_on_the_cpu(
    old_driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container on a machine with GPUs, to which none were given, has the module but no devices."""
    for path in old_driver.glob("nvidia[0-9]"):
        path.unlink()
    assert unusable_gpus() == ""
    with pytest.raises(UserError, match="there is no GPU here"):
        check_device_type("cuda")


@pytest.mark.usefixtures("old_driver")
def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in unusable_gpus()


def test_a_driver_that_says_nothing_is_unknown(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "missing") == "unknown"


@pytest.mark.parametrize(
    ("gib", "length", "rows"),
    [
        (79.2, 2048, 32),
        (39.4, 2048, 16),
        (31.4, 2048, 8),
        (22.0, 2048, 4),
        (14.6, 2048, 4),
        (79.2, 512, 128),
    ],
)
def test_rows_follow_from_the_cards_memory(gib: float, length: int, rows: int) -> None:
    assert rows_by_memory(int(gib * 2**30), length) == rows
    assert rows_by_memory(int(gib * 2**30), 1 << 20) == 1


def test_rows_that_are_chosen_divide_a_ranks_share_evenly() -> None:
    cpu = torch.device("cpu")
    assert device_rows(0, device=cpu, sequence_len=2048, rank_rows=256) == 8
    assert device_rows(0, device=cpu, sequence_len=2048, rank_rows=10) == 5
    assert device_rows(0, device=cpu, sequence_len=2048, rank_rows=3) == 3
    assert device_rows(12, device=cpu, sequence_len=2048, rank_rows=10) == 12, "as it was told"


def test_a_cards_peak_is_found_by_its_name() -> None:
    assert peak_flops_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops_of("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops_of("NVIDIA A10G") == 70e12
    assert peak_flops_of("NVIDIA GeForce GTX 1080") is None


def test_mfu_is_the_share_of_all_devices_arithmetic_and_a_cpu_has_none() -> None:
    # 8 cards of 989 TFLOP/s at 1.2 M tokens/s of depth 20 (docs/performance.md: 3.49 GFLOP a token)
    assert mfu(1.2e6, token_flops=3.49e9, peak=8 * 989e12) == pytest.approx(0.5293, abs=1e-4)
    assert mfu(1.2e6, token_flops=3.49e9, peak=peak_flops(torch.device("cpu"), 8)) is None


def test_a_cpu_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    prepare_device(torch.device("cpu"), cache=Path("unused"))
    assert "PYTORCH_ALLOC_CONF" not in common.os.environ
    assert capability_of(torch.device("cpu")) == (0, 0)


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_grows_in_place_unless_the_user_says_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in (*names, "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "own")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    monkeypatch.setattr(gpus._Known, "capability", (9, 0))
    precision = torch.get_float32_matmul_precision()
    try:
        prepare_device(torch.device("cuda", 0), cache=tmp_path)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    told = [common.os.environ.get(n) for n in names]
    assert ("expandable_segments:True" in told) is (own is None)
    assert common.os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    assert common.os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_what_was_set_aside_is_looked_at_again() -> None:
    try:
        settle_garbage()
        first = gc.get_freeze_count()
        assert first > 0
        settle_garbage()
        assert gc.get_freeze_count() < 2 * first
    finally:
        gc.unfreeze()
