"""`python -m scripts.tok_eval`."""

import sys

import pytest
import requests
import tiktoken

from nanochat.common import run_command_line
from scripts import tok_eval

from .data_kit import byte_tokenizer, texts, write_shard


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    byte_tokenizer(tmp_path / "tok")
    for number in range(2):
        write_shard(tmp_path / "mine", number, texts(50, seed=number))
    return [f"--source={tmp_path / 'mine'}", f"--tokenizer={tmp_path / 'tok'}"]


def run_main(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["tok_eval", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_command_line(tok_eval.main)
    return exit.value.code


def offline(name: str) -> tiktoken.Encoding:
    raise requests.ConnectionError(f"no network for {name}")


def pairs_of_bytes(name: str) -> tiktoken.Encoding:
    """As if public: every pair of ASCII characters is a token."""
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {bytes([a, b]): 256 + 128 * a + b for a in range(128) for b in range(128)}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]{2}", mergeable_ranks=ranks, special_tokens={})


def test_offline_is_said_and_the_rest_is_measured(arguments, monkeypatch, capsys):
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert run_main(monkeypatch, arguments) == 0
    out = capsys.readouterr().out
    num_bytes = sum(len(text.encode()) for text in texts(50, seed=1))  # the validation shard alone
    assert f"50 documents, {num_bytes:,} bytes" in out
    row = next(line for line in out.splitlines() if line.startswith("tok "))
    assert row.split() == ["tok", "265", f"{num_bytes:,}", "1.000", "+0.0%"]
    for name in ("GPT-2 (gpt2)", "GPT-4 (cl100k_base)"):
        assert f"{name}: not in tiktoken's cache and not to be downloaded" in out


def test_public_tokenizers_are_rows_of_the_table(arguments, monkeypatch, capsys):
    monkeypatch.setattr(tiktoken, "get_encoding", pairs_of_bytes)
    assert run_main(monkeypatch, arguments) == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split()[0] for row in rows] == ["tok", "GPT-2", "GPT-4"]
    vocabulary, tokens, bytes_per_token, more = rows[1].split()[2:]
    assert vocabulary == "16,640" and more.startswith("-") and float(bytes_per_token) > 1.9
    assert int(tokens.replace(",", "")) > 0


def test_a_missing_tokenizer_is_a_sentence(arguments, monkeypatch, capsys, tmp_path):
    assert run_main(monkeypatch, [arguments[0], f"--tokenizer={tmp_path / 'none'}"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no tokenizer in")


def test_no_characters_to_read_are_a_sentence(arguments, monkeypatch, capsys):
    assert run_main(monkeypatch, [*arguments, "--max-chars=0"]) == 2
    assert capsys.readouterr().err == "error: --max-chars is 0: it must be at least 1\n"
