"""Talking to a base model from a shell."""

import io
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import run_command_line
from nanochat.gpt import build_gpt, config_for_depth
from scripts import chat_cli

from .data_kit import byte_tokenizer


@pytest.fixture
def checkpoint(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that says mostly ASCII, and the tag that it is found by."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    tokenizer = byte_tokenizer(base_dir / "tokenizer")
    config = config_for_depth(1, vocab_size=tokenizer.get_vocab_size(), sequence_len=32)
    model = build_gpt(config, device=torch.device("cpu"), seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    meta = {"model_config": config.to_meta(), "step": 3}
    save_checkpoint(base_dir / "base_checkpoints" / "talker", 3, model.state_dict(), None, meta)
    return "talker"


def _call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["chat_cli", "--device-type", "cpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command_line(chat_cli.main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_prompts_are_continued_and_a_seed_repeats_it(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        options = ["--checkpoint", checkpoint, "--max-tokens", "8", "--prompt", "Once", *arguments]
        assert _call(*options, monkeypatch=monkeypatch) == 0
        return capsys.readouterr().out

    first = said("--seed", "1")
    assert first.startswith("Once") and len(first) > 6
    assert first == said("--seed", "1") != said("--seed", "2")
    assert said("-t", "0", "--seed", "1") == said("-k", "1", "--seed", "2")
    several = said("-n", "3", "-p", "Twice")
    assert several.count("Once") == several.count("Twice") == 3 and "--- 3\n" in several


def test_it_asks_for_texts_until_an_empty_line(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed in ("Hello\nthere\n\nunheard\n", "Hello\nthere\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        options = ["--checkpoint", checkpoint, "--max-tokens", "4"]
        assert _call(*options, monkeypatch=monkeypatch) == 0
        output = capsys.readouterr().out
        assert "classic model of depth 1, step 3" in output
        assert "> Hello" in output and "> there" in output and "unheard" not in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "--temperature is -1"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--top-k", "-3"], "--top-k is -3"),
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--max-tokens", "400", "-p", "x"], "320 positions"),
        (["--temperature", "inf"], "--temperature is inf"),
        (["--seed", str(2**64)], "--seed is 18446744073709551616: it must fit into 64 bits"),
        (["--num-samples", str(10**12)], "--num-samples is 1000000000000"),
        (["--checkpoint", "nobody"], "no model called 'nobody'"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    said: str,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _call("--checkpoint", checkpoint, *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_a_line_that_is_too_long_costs_one_line_and_is_not_repeated(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'long ' * 100}\nHello\n"))
    options = ["--checkpoint", checkpoint, "--max-tokens", "4"]
    assert _call(*options, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert (
        said.err.count("\n") == 1 and "a prompt of 501 tokens and 4 more are too many" in said.err
    )
    assert "long" not in said.out and "> Hello" in said.out


def test_bytes_that_are_no_text_are_read_and_what_cannot_be_shown_is_replaced(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xc3\xa9\n\n"), encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys, "stdout", shown)
    options = ["--checkpoint", checkpoint, "--max-tokens", "1"]
    assert _call(*options, monkeypatch=monkeypatch) == 0
    shown.seek(0)
    assert "> caf? ?" in shown.read()


def test_the_coldest_temperature_there_is_takes_the_likeliest(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = set()
    for temperature in ("0", "1e-30", "1e-45", "5e-324"):
        options = ["--checkpoint", checkpoint, "--max-tokens", "8", "-p", "Once", "-t", temperature]
        assert _call(*options, monkeypatch=monkeypatch) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_another_tokenizer_than_the_models_is_refused(
    checkpoint: str,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    byte_tokenizer(base_dir / "tokenizer", num_pairs=3)
    assert _call("--checkpoint", checkpoint, "-p", "x", monkeypatch=monkeypatch) == 2
    assert "the model has 265 tokens and the tokenizer" in capsys.readouterr().err
