"""How a site joins a head: one line of JSON each way, over TLS.

The site has a token (`tokens.py`). First it asks for the CA's certificate without knowing whom it speaks to,
and compares its fingerprint with the token's. Then it connects again, now with that CA as the only one it
trusts, and only then shows the secret and its public key. The private key never leaves it.
"""

import json
import socket
import ssl
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot.errors import PilotError
from pilot.fleet.certificates import fingerprint, site_key
from pilot.fleet.secret_file import private_directory, read_secret, write_secret
from pilot.fleet.tokens import NO_CA, Token

JOIN_PORT = 8001
_TIMEOUT_S, _ANSWER_S = 15.0, 90.0  # the head registers the key before it answers
_MAX_ANSWER_BYTES = 1 << 16


@dataclass(frozen=True)
class Membership:
    """What a site knows of its head."""

    head: str  # its name or address, without a port
    superlink_port: int
    redis_port: int
    redis_user: str
    redis_password: str
    secure: bool
    token_hash: str  # of the token that was used

    @staticmethod
    def read(directory: Path) -> "Membership | None":
        """That of a site that has joined; None if it has not. Raises PilotError if it cannot be used."""
        path = directory / "head.json"
        try:
            return Membership(**json.loads(read_secret(path)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise PilotError(
                f"{path} cannot be read: remove it, and join with a new token"
            ) from error


def ca_path(directory: Path) -> Path:
    return directory / "ca.pem"


def key_path(directory: Path) -> Path:
    return directory / "node.key"


def enrol(directory: Path, *, head: str, port: int, name: str, token: Token) -> Membership:
    """Join `head`, and keep in `directory` what it gives. Raises PilotError, with one sentence."""
    private_directory(directory)
    secure = token.fingerprint != NO_CA
    context = None
    if secure:
        authority = _fetch_authority(head, port)
        if _fingerprint(authority) != token.fingerprint:
            raise PilotError(
                f"{head}:{port} is not the head that issued this token: its CA has another fingerprint"
            )
        write_secret(ca_path(directory), authority)
        context = ssl.create_default_context(cafile=str(ca_path(directory)))
    request = {"name": name, "key": site_key(key_path(directory)), "secret": token.secret.hex()}
    answer = _ask(head, port, request, context)
    try:
        membership = Membership(
            head=head,
            superlink_port=int(answer["superlink_port"]),
            redis_port=int(answer["redis_port"]),
            redis_user=str(answer["redis_user"]),
            redis_password=str(answer["redis_password"]),
            secure=secure,
            token_hash=token_hash(token),
        )
    except (KeyError, TypeError, ValueError):
        raise PilotError(
            f"{head}:{port} answered, but not as a head does: check host and port"
        ) from None
    write_secret(directory / "head.json", json.dumps(asdict(membership), indent=1))
    return membership


def token_hash(token: Token) -> str:
    """By which a site knows again a token that it has used."""
    import hashlib

    return hashlib.sha256(str(token).encode()).hexdigest()


def _fetch_authority(head: str, port: int) -> bytes:
    """The CA's certificate, from somebody who may be anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    answer = _ask(head, port, {"ca": True}, context)
    return str(answer.get("ca", "")).encode()


def _fingerprint(pem: bytes) -> bytes:
    try:
        return fingerprint(pem)
    except ValueError:
        return b""


def _ask(
    head: str, port: int, request: dict[str, Any], tls: ssl.SSLContext | None
) -> dict[str, Any]:
    """The head's answer. Raises PilotError if there is none, or if it is a refusal."""
    where = f"{head}:{port}"
    try:
        with socket.create_connection((head, port), _TIMEOUT_S) as plain:
            connection = tls.wrap_socket(plain, server_hostname=head) if tls else plain
            with connection:
                connection.settimeout(_ANSWER_S)
                connection.sendall(json.dumps(request).encode() + b"\n")
                line = _line(connection)
    except ssl.SSLCertVerificationError as error:
        raise PilotError(
            f"the certificate of {where} is not for that name ({error.verify_message}): start the head "
            f"with `--address {head}`"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PilotError(
            f"no head answers at {where} ({reason}): is `pilot up --head` running there, and the port open?"
        ) from error
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise PilotError(f"{where} answered, but not as a head does: check host and port")
    if "error" in answer:
        raise PilotError(f"the head refused: {' '.join(str(answer['error']).split())[:300]}")
    return answer


def _line(connection: socket.socket) -> bytes:
    """What comes before the end of the line, or of the connection."""
    found = b""
    while b"\n" not in found and len(found) < _MAX_ANSWER_BYTES:
        if not (more := connection.recv(4096)):
            break
        found += more
    return found
