"""What a head tells sites, and the file in which it keeps how it is reached."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot.errors import PilotError
from pilot.fleet.certificates import Authority
from pilot.fleet.enrol import JOIN_PORT
from pilot.fleet.members import Members, answer_join
from pilot.fleet.secret_file import read_secret, write_secret
from pilot.fleet.tokens import NO_CA, Tokens

_NAME = "head.json"


@dataclass(frozen=True)
class Head:
    """How other machines reach this one."""

    address: str
    join_port: int
    superlink_port: int
    redis_port: int
    secure: bool

    @property
    def shown(self) -> str:
        """HEAD of `pilot join HEAD`."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return host if self.join_port == JOIN_PORT else f"{host}:{self.join_port}"

    def answers(
        self, directory: Path, authority: bytes, members: Members, say: Callable[[str], None]
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """A function that answers what sites ask (`enrol.py`)."""
        tokens = Tokens(directory)

        def take(secret: bytes, name: str) -> None:
            tokens.take(secret, name, known=members.known(name), now_s=time.time())

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            if request.get("ca") is True:
                return {"ca": authority.decode("ascii")}
            try:
                found = answer_join(request, members, take)
            except (PilotError, OSError) as error:
                say(f"a site could not join: {error}")
                return {"error": "the head has a problem of its own: see its log"}
            if "error" in found:
                say(f"a site was refused: {found['error']}")
                return found
            say(f"site {request['name']} has joined")
            return {**found, "superlink_port": self.superlink_port, "redis_port": self.redis_port}

        return answer


def join_line(directory: Path, client: str = "") -> str:
    """The command that joins a site, with a new token. Raises PilotError if this is no head."""
    head = read_head(directory)
    fingerprint = Authority(directory).fingerprint if head.secure else NO_CA
    token = Tokens(directory).issue(fingerprint, client=client, now_s=time.time())
    insecure = "" if head.secure else " --insecure"
    return f"pilot join {head.shown} --name {client or 'NAME'}{insecure} --token {token}"


def write_head(directory: Path, head: Head) -> None:
    write_secret(directory / _NAME, json.dumps(asdict(head), indent=1))


def read_head(directory: Path) -> Head:
    """Raises PilotError if no `pilot up --head` was ever here."""
    try:
        return Head(**json.loads(read_secret(directory / _NAME)))
    except FileNotFoundError:
        raise PilotError(
            "this machine is no head yet: start `pilot up --head`, or name its fleet's directory with --dir"
        ) from None
