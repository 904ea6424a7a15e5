"""Numbers that no computation can take are refused by name, before anything begins."""

import sys
from collections.abc import Callable

import pytest

import nanochat_train
from nanochat.common import run_command_line
from nanochat.errors import UserError
from nanochat.limits import check_number, number_fault
from nanochat.resume import find_saved
from nanochat.schedule import make_schedule
from nanochat.settings import Settings
from scripts import base_eval, base_train, chat_cli, tok_train

NAN, INF = float("nan"), float("inf")
FLOATS = [
    name for name, field in Settings.__dataclass_fields__.items() if "float" in str(field.type)
]


def test_what_64_bits_hold_is_a_number() -> None:
    for good in (0, -1, 2**63 - 1, 1e300, -0.5):
        assert number_fault(good) == ""
    for bad in (NAN, INF, -INF, 2**63, -(2**70)):
        assert number_fault(bad)


def test_a_range_has_no_room_for_nan() -> None:
    check_number("x", 3, low=3, high=3)
    for value in (NAN, INF, -INF):
        with pytest.raises(UserError, match=rf"^x is {value}: it must be a finite number$"):
            check_number("x", value, low=0, high=1)
    with pytest.raises(UserError, match=r"^x is -1: it must not be negative$"):
        check_number("x", -1, low=0)
    with pytest.raises(UserError, match=r"^x is 0: it must be at least 1$"):
        check_number("x", 0, low=1)
    with pytest.raises(UserError, match=r"^x is 2000: it must be at most 1,000$"):
        check_number("x", 2000, high=1000)


@pytest.mark.parametrize("name", FLOATS)
def test_no_setting_may_be_nan_or_infinite(name: str) -> None:
    assert len(FLOATS) == 11
    for value in (NAN, INF, -INF):
        with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} is {value}: "):
            Settings(**{name: value}).check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**63),
        ("depth", 10**9),
        ("head_dim", 10**9),
        ("max_seq_len", 2**31),
        ("total_batch_size", 2**62),
        ("num_iterations", 2**64),
        ("eval_rows", 2**64),
        ("lr", -0.1),
        ("weight_decay", -1.0),
        ("save_keep", -1),
    ],
)
def test_settings_beyond_what_can_be_computed_are_refused(name: str, value: float) -> None:
    changes: dict[str, object] = {name: value}
    with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} is {value}: "):
        Settings(**changes).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["warmup_steps", "warmdown_ratio"])
def test_a_schedule_takes_no_nan(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is nan"):
        make_schedule("pilot", total_steps=4, weight_decay=0.1, **{name: NAN})
    with pytest.raises(UserError, match="the run has nan steps"):
        make_schedule("pilot", total_steps=NAN, weight_decay=0.1)


@pytest.mark.parametrize("wanted", ["²", "1_0", "+3", " 3", "٣", "", "3" * 30, "-2"])
def test_a_step_is_written_in_plain_digits(wanted: str, tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="give a number or latest"):
        find_saved(tmp_path, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (base_train.main, ["--lr", "nan"], "--lr is nan: it must be a finite number"),
        (base_train.main, ["--target-flops", "inf"], "--target-flops is inf: it must be a finite"),
        (base_train.main, ["--seed", str(2**63)], "--seed is 9223372036854775808: it must fit"),
        (nanochat_train.main, ["--lr", "inf"], "--lr is inf: it must be a finite number"),
        (nanochat_train.main, ["--seed", str(2**70)], "must fit into 64 bits"),
        (base_eval.main, ["--checkpoint", "x", "--eval-rows", "9" * 30], "must fit into 64 bits"),
        (chat_cli.main, ["--checkpoint", "x", "--temperature", "inf"], "--temperature is inf"),
        (chat_cli.main, ["--checkpoint", "x", "--seed", str(2**64)], "must fit into 64 bits"),
        (
            tok_train.main,
            ["--vocab-size", str(2**33)],
            "a vocabulary of 8,589,934,592 is too large",
        ),
        (tok_train.main, ["--max-chars", "9" * 30], "--max-chars is " + "9" * 30),
    ],
)
def test_every_command_says_so_in_one_line(
    main: Callable[[], None],
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command_line(main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error
    assert error.startswith("error: ") and error.count("\n") == 1
