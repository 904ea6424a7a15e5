"""A token admits one site, once, within a day."""

from pathlib import Path

import pytest

from pilot.errors import PilotError
from pilot.fleet.tokens import VALID_S, Token, TokenRefused, Tokens

CA = bytes(range(32))


def test_a_token_is_a_text_that_says_whom_to_trust(tmp_path: Path) -> None:
    token = Tokens(tmp_path).issue(CA, client="", now_s=0.0)
    read = Token.read(f" {token}\n")
    assert read == token and read.fingerprint == CA and len(str(token)) == 64
    for text in ("", "short", f"{token}A", "!" * 64):
        with pytest.raises(PilotError) as refused:
            Token.read(text)
        assert not text or text not in str(refused.value)


def test_a_token_is_taken_once_by_one_site_also_after_a_restart(tmp_path: Path) -> None:
    first, second = (Tokens(tmp_path).issue(CA, client="", now_s=0.0) for _ in range(2))
    Tokens(tmp_path).take(first.secret, "a", known=False, now_s=1.0)
    with pytest.raises(TokenRefused, match="used before, by a"):
        Tokens(tmp_path).take(first.secret, "b", known=False, now_s=2.0)
    with pytest.raises(TokenRefused, match="used before"):
        Tokens(tmp_path).take(first.secret, "a", known=True, now_s=2.0)
    with pytest.raises(TokenRefused, match="expired"):
        Tokens(tmp_path).take(second.secret, "b", known=False, now_s=VALID_S + 1)
    with pytest.raises(TokenRefused, match="no such token"):
        Tokens(tmp_path).take(bytes(16), "b", known=False, now_s=2.0)
    Tokens(tmp_path).take(second.secret, "b", known=False, now_s=VALID_S - 1)


def test_a_name_is_taken_over_only_with_a_token_for_it(tmp_path: Path) -> None:
    tokens = Tokens(tmp_path)
    free, bound = (tokens.issue(CA, client=name, now_s=0.0) for name in ("", "a"))
    with pytest.raises(TokenRefused, match="--for a"):
        tokens.take(free.secret, "a", known=True, now_s=1.0)
    with pytest.raises(TokenRefused, match="for a, not for b"):
        tokens.take(bound.secret, "b", known=False, now_s=1.0)
    tokens.take(bound.secret, "a", known=True, now_s=1.0)
    tokens.take(free.secret, "c", known=False, now_s=1.0)


def test_secrets_are_not_on_the_disk(tmp_path: Path) -> None:
    token = Tokens(tmp_path).issue(CA, client="", now_s=0.0)
    text = (tmp_path / "tokens.json").read_text()
    assert token.secret.hex() not in text and str(token) not in text
    assert (tmp_path / "tokens.json").stat().st_mode & 0o777 == 0o600
