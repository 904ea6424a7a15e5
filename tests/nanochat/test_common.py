"""nanochat.common: nothing is decided at import time, and mistakes are one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import common
from nanochat.common import ArgumentParser
from nanochat.errors import UserError


def test_base_dir_is_read_at_each_call_and_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name / "deep"))
        assert common.get_base_dir() == tmp_path / name / "deep"
        assert common.get_base_dir().is_dir()


def test_base_dir_that_cannot_be_made_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        common.get_base_dir()


def test_importing_common_does_not_import_torch() -> None:
    code = "import sys, nanochat.common; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rank_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert common.get_dist_info() == (False, 0, 0, 1)
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert common.get_dist_info() == (True, 5, 1, 8)


def test_a_device_that_is_not_there_is_a_user_error() -> None:
    with pytest.raises(UserError, match="cuda, mps, cpu"):
        common.compute_init("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="choose the device type cpu"):
            common.compute_init("cuda")


def test_mps_has_no_process_group_and_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert common.compute_init("mps")[3] == 1
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="share the MPS device"):
        common.compute_init("mps")


def test_options_may_be_written_with_dashes_or_underscores() -> None:
    parser = ArgumentParser()
    parser.add_argument("--max-chars", type=int)
    parser.add_argument("--name")
    for spelling in (["--max-chars", "7"], ["--max_chars=7"], ["--", "--max_chars", "7"]):
        assert parser.parse_args(spelling).max_chars == 7
    assert parser.parse_args(["--name=a_b--c_d"]).name == "a_b--c_d"


def test_wrong_options_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_argument("--depth", type=int)
    for arguments in (["--depth", "x"], ["--dept", "3"], ["--wide", "3"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("outcome", "code", "stderr"),
    [
        (None, 0, ""),
        (UserError("do that"), 2, "error: do that\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
    ],
)
def test_command_lines_end_with_a_code_and_a_sentence(
    outcome: BaseException | None, code: int, stderr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if outcome is not None:
            raise outcome

    with pytest.raises(SystemExit) as stop:
        common.run_command_line(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == stderr


def test_output_that_nobody_reads_ends_quietly() -> None:
    program = (
        "from nanochat.common import run_command_line\n"
        "def main():\n    while True:\n        print('x' * 5000)\n"
        "run_command_line(main)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_pipe_that_broke_elsewhere_is_not_hidden() -> None:
    def main() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        common.run_command_line(main)


@pytest.mark.parametrize("spelling", ["x", "./x", "../here/x"])
def test_a_path_is_absolute_once_it_is_inside(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.user_path(spelling) == tmp_path / "here" / "x"
    assert common.user_path("~/x") == tmp_path / "x"
    with pytest.raises(UserError, match="home directory of nobody"):
        common.user_path("~nobody-has-this-name/x")
