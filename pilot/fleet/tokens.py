"""Tokens: what a site shows once to be let in.

A token is the fingerprint of the head's CA (32 bytes) and a secret (16 bytes), in base64. By the first the site
knows the head, by the second the head knows the site. The head keeps a hash of each secret and whether it was
used, in a file, so that a token admits one site, whatever dies and whatever is copied.
"""

import base64
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from pilot.errors import PilotError
from pilot.fleet.secret_file import read_secret, write_secret

VALID_S = 24 * 3600.0
_FINGERPRINT_BYTES, _SECRET_BYTES = 32, 16
_FORGET_S = 30 * 24 * 3600.0  # for how long the head still knows who used a token
NO_CA = bytes(_FINGERPRINT_BYTES)  # of a head without TLS


@dataclass(frozen=True)
class Token:
    fingerprint: bytes
    secret: bytes

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(self.fingerprint + self.secret).decode("ascii")

    @staticmethod
    def read(text: str) -> "Token":
        """Raises PilotError, which does not repeat the text, if it is no token."""
        try:
            raw = base64.b64decode(text.strip(), altchars=b"-_", validate=True)
        except ValueError:
            raw = b""
        if len(raw) != _FINGERPRINT_BYTES + _SECRET_BYTES:
            raise PilotError(
                "the token is not one: it has 64 letters, digits, - and _, as `pilot token` prints them"
            )
        return Token(raw[:_FINGERPRINT_BYTES], raw[_FINGERPRINT_BYTES:])


class TokenRefused(Exception):
    """The reason is for the site that showed the token."""


@dataclass(frozen=True)
class _Issued:
    hash: str  # SHA-256 of the secret, in hex
    client: str  # the only one that it admits, even if it is known; "": any that is not
    expires_s: float  # seconds since 1970
    used_by: str = ""


class Tokens:
    """The tokens that a head has issued, in its directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "tokens.json"
        self._lock = FileLock(directory / "tokens.lock", mode=0o600)

    def issue(self, fingerprint: bytes, *, client: str, now_s: float) -> Token:
        """A new token, valid for a day."""
        token = Token(fingerprint, secrets.token_bytes(_SECRET_BYTES))
        with self._changed(now_s) as issued:
            issued.append(_Issued(_hash(token.secret), client, now_s + VALID_S))
        return token

    def take(self, secret: bytes, client: str, *, known: bool, now_s: float) -> None:
        """Use a token for `client`, which is `known` if a site of that name was admitted before.

        Raises TokenRefused; then nothing has changed.
        """
        with self._changed(now_s) as issued:
            found = [entry for entry in issued if entry.hash == _hash(secret)]
            if not found:
                raise TokenRefused("this head has issued no such token")
            (entry,) = found
            if entry.used_by:
                raise TokenRefused(f"the token was used before, by {entry.used_by}")
            if entry.expires_s < now_s:
                raise TokenRefused("the token has expired")
            if entry.client not in ("", client):
                raise TokenRefused(f"the token is for {entry.client}, not for {client}")
            if known and not entry.client:
                raise TokenRefused(
                    f"there is a site {client} already: choose another --name, or let it be replaced "
                    f"with a token of `pilot token --for {client}`"
                )
            issued[issued.index(entry)] = replace(entry, used_by=client)

    @contextmanager
    def _changed(self, now_s: float) -> Iterator[list[_Issued]]:
        """The tokens, which are written back unless an exception is raised."""
        with self._lock:
            try:
                found = [_Issued(**entry) for entry in json.loads(read_secret(self._path))]
            except FileNotFoundError:
                found = []
            yield found
            kept = [asdict(entry) for entry in found if entry.expires_s + _FORGET_S > now_s]
            write_secret(self._path, json.dumps(kept, indent=1))


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
