"""What a machine and a run get: the one place where dtype, attention kernel and compiling are chosen."""

from pathlib import Path

import pytest
import torch

from nanochat import common
from nanochat.errors import UserError
from nanochat.kernels import choices
from nanochat.kernels.choices import (
    CompileChoice,
    HeadPasses,
    Kernel,
    choose_compile,
    choose_head_passes,
    choose_kernel,
    default_compute_dtype,
    make_choices,
    training_seconds,
    what_compiling_lacks,
)

LONG = 1e6  # seconds


def test_compiling_is_chosen_where_it_pays() -> None:
    assert choose_compile("auto", device_type="cuda", missing="", run_s=LONG).on
    assert choose_compile("auto", device_type="cuda", missing="", run_s=LONG, process_s=LONG).on
    assert not choose_compile("auto", device_type="cuda", missing="", run_s=30.0).on
    assert not choose_compile("auto", device_type="cpu", missing="", run_s=LONG).on
    assert not choose_compile("auto", device_type="cuda", missing="", run_s=LONG, process_s=5.0).on


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_without_a_compiler_the_step_stays_eager_and_the_line_says_why(mode: str) -> None:
    choice = choose_compile(mode, device_type="cpu", missing="there is no C++ compiler", run_s=LONG)
    assert choice == CompileChoice(False, "there is no C++ compiler")
    assert str(choice) == "compile: off (there is no C++ compiler)"


def test_a_requested_mode_wins_over_the_work_left() -> None:
    assert choose_compile("on", device_type="cuda", missing="", run_s=1.0).on
    assert not choose_compile("off", device_type="cuda", missing="", run_s=LONG).on
    with pytest.raises(ValueError, match="auto, on, off"):
        choose_compile("perhaps", device_type="cuda", missing="", run_s=LONG)


def test_guessed_seconds_fall_with_threads_and_devices() -> None:
    one = training_seconds(1e12, "cpu", threads=1)
    assert training_seconds(1e12, "cpu", threads=4, devices=2) == pytest.approx(one / 8)
    assert training_seconds(1e12, "cuda", threads=1) < one


def test_a_machine_without_compiler_or_headers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_compiling_lacks("mps")
    monkeypatch.setattr(choices.shutil, "which", lambda name: None)
    assert "compiler" in what_compiling_lacks("cpu")
    monkeypatch.setattr(choices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(choices.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "headers" in what_compiling_lacks("cpu")


def test_dtype_of_the_environment_wins_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "float16", "float32"):
        monkeypatch.setenv("NANOCHAT_DTYPE", name)
        assert default_compute_dtype("cpu") == getattr(torch, name)
        assert getattr(torch, name) == common.COMPUTE_DTYPE
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(UserError, match="bfloat16, float16, float32"):
        default_compute_dtype("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_cpu_computes_in_bf16_only_where_it_is_native(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    expected = torch.bfloat16 if native else torch.float32
    assert default_compute_dtype("cpu") == expected
    assert default_compute_dtype("mps") == torch.float32


@pytest.mark.parametrize(
    ("device_type", "dtype", "window", "has_flash3", "compiled", "kernel"),
    [
        ("cpu", torch.float32, 127, False, False, Kernel.CAUSAL),  # all of 128 positions
        ("cpu", torch.bfloat16, 126, False, False, Kernel.BLOCKED),
        ("cpu", torch.float16, 32, False, False, Kernel.MASK),
        ("cuda", torch.bfloat16, 2048, False, False, Kernel.CAUSAL),
        ("cuda", torch.bfloat16, 32, False, False, Kernel.MASK),
        ("cuda", torch.bfloat16, 32, False, True, Kernel.FLEX),
        ("cuda", torch.bfloat16, 127, False, True, Kernel.CAUSAL),
        ("cuda", torch.float32, 32, True, True, Kernel.FLEX),
        ("cuda", torch.bfloat16, 32, True, True, Kernel.FLASH3),
        ("cpu", torch.bfloat16, 32, False, True, Kernel.BLOCKED),
        ("mps", torch.float32, 32, False, False, Kernel.MASK),
        ("cuda", torch.bfloat16, 32, True, False, Kernel.FLASH3),
        ("cuda", torch.float16, 2048, True, False, Kernel.FLASH3),
        ("cuda", torch.float32, 32, True, False, Kernel.MASK),  # it has no fp32
        ("cuda", torch.float32, 2048, True, False, Kernel.CAUSAL),
        ("cpu", torch.bfloat16, 32, True, False, Kernel.BLOCKED),
    ],
)
def test_the_kernel_follows_from_device_dtype_and_window(
    device_type: str,
    dtype: torch.dtype,
    window: int,
    has_flash3: bool,
    compiled: bool,
    kernel: Kernel,
) -> None:
    chosen = choose_kernel(
        device_type=device_type,
        dtype=dtype,
        length=128,
        window=window,
        has_flash3=has_flash3,
        compiled=compiled,
    )
    assert chosen is kernel


def test_the_heads_passes_are_fused_on_gpus_that_can_compile() -> None:
    assert choose_head_passes(device_type="cuda", missing="") is HeadPasses.FUSED
    assert choose_head_passes(device_type="cuda", missing="no triton") is HeadPasses.EAGER
    assert choose_head_passes(device_type="cpu", missing="") is HeadPasses.EAGER


def test_one_sentence_says_what_was_chosen() -> None:
    chosen = make_choices(
        device_type="cpu",
        dtype=torch.bfloat16,
        windows=(128, 128, 512),
        length=512,
        has_flash3=False,
        compiling=CompileChoice(False, "requested"),
    )
    assert str(chosen) == (
        "Training step: matmuls in bfloat16; attention by blocks of queries (window 128), "
        "torch's fused causal attention (window 512); compile: off (requested)"
    )


@pytest.mark.parametrize(
    ("row", "device_type", "capability", "has_flash3"),
    [
        (0, "cuda", (9, 0), True),
        (1, "cuda", (8, 0), False),
        (2, "cuda", (7, 5), False),
        (3, "cpu", (0, 0), False),
    ],
)
def test_the_table_of_the_docs_is_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    row: int,
    device_type: str,
    capability: tuple[int, int],
    has_flash3: bool,
) -> None:
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device_type == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    dtype = default_compute_dtype(device_type)

    def kernel(window: int, *, compiled: bool) -> str:
        return choose_kernel(
            device_type=device_type,
            dtype=dtype,
            length=2048,
            window=window,
            has_flash3=has_flash3,
            compiled=compiled,
        ).value

    page = Path(__file__).parents[3].joinpath("docs/deployment.md").read_text(encoding="utf-8")
    lines = page.partition("<!-- kernels:")[2].partition("<!-- /kernels -->")[0].splitlines()
    _, matmuls, full, *rest = (cell.strip() for cell in lines[3 + row].strip("|").split("|"))
    assert str(dtype).removeprefix("torch.") in matmuls
    assert full == kernel(2048, compiled=True) == kernel(2048, compiled=False)
    passes = choose_head_passes(device_type=device_type, missing="").value
    assert rest == [kernel(512, compiled=True), kernel(512, compiled=False), passes]
