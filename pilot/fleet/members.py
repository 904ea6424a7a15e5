"""The sites of a head: a public key and a Redis user each, in files, which Flower and Redis are made to follow.

The files are the truth. A SuperLink keeps its nodes in memory, so all keys are registered again after each of
its starts; a site whose files are removed is shut out.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import redis

from pilot.config import check_name
from pilot.errors import PilotError
from pilot.fleet.certificates import check_site_key
from pilot.fleet.places import CONNECTION
from pilot.fleet.redis_users import Admin, new_password, password_hash, user_of
from pilot.fleet.secret_file import private_directory, read_secret, write_secret
from pilot.fleet.tokens import TokenRefused
from pilot.launch.flower_commands import FlowerCommands

_LOOK_S = 1.0
_ALREADY = "already"  # how Flower says that a key is registered: by an earlier process of ours


class Members:
    """Admits sites and keeps Flower and Redis as their files are. Its methods may be called by any thread."""

    def __init__(
        self,
        directory: Path,
        admin: Admin,
        say: Callable[[str], None],
        *,
        env: Mapping[str, str] | None,
        answers: Callable[[], bool],
    ) -> None:
        """`env`: of `flwr` commands, None where nodes have no keys; `answers`: whether the SuperLink does."""
        self._sites = private_directory(directory / "sites")
        self._env, self._admin, self._say, self._answers = env, admin, say, answers
        self._nodes: dict[str, tuple[str, str]] = {}  # name → (public key, Flower's id)
        self._users: dict[str, str] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._usable, self._trouble = False, ""
        self._thread = threading.Thread(target=self._follow, name="members", daemon=True)

    def known(self, name: str) -> bool:
        return (self._sites / name).is_dir()

    def admit(self, name: str, key: str) -> str:
        """Let a site in, in place of one of the same name; the password of its Redis user.

        Raises ConfigError or ValueError for a name or a key that cannot be.
        """
        check_name(name, "--name")
        check_site_key(key)
        password = new_password()
        with self._lock:
            directory = private_directory(self._sites / name)
            write_secret(directory / "node.pub", key)
            write_secret(directory / "redis.json", json.dumps({"hash": password_hash(password)}))
            if self._usable:
                self._try_to_sync()
        return password

    def admit_own(self, name: str, key: str) -> None:
        """Let a client of this machine in. Raises PilotError if another machine has joined as `name`."""
        there = self._read().get(name)
        if there is None:
            self.admit(name, key)
        elif there[0] != key:
            raise PilotError(
                f"a site {name} has joined from another machine: choose another --name for the clients here"
            )

    # -- Flower and Redis --------------------------------------------------------------------------

    def follow(self) -> None:
        """From now on a thread looks for changes; SuperLink and Redis answer."""
        self._usable = True
        self._try_to_sync()
        self._thread.start()

    def forget(self) -> None:
        """The SuperLink was started again, and knows no node."""
        with self._lock:
            self._nodes.clear()

    def close(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _follow(self) -> None:
        while not self._over.wait(_LOOK_S):
            self._try_to_sync()

    def _try_to_sync(self) -> None:
        try:
            self.sync()
        except (OSError, redis.RedisError, PilotError) as error:  # the next look tries again
            if str(error) != self._trouble:
                self._say(f"sites are not all known yet: {error}")
            self._trouble = str(error)
        else:
            self._trouble = ""

    def sync(self) -> None:
        """Make Flower and Redis know these sites and no others, as far as they do not."""
        with self._lock:
            sites = self._read()
            users = {name: hashed for name, (_, hashed) in sites.items()}
            if users != self._users:
                changed = [name for name in users if users[name] != self._users.get(name)]
                self._admin.let_in(users, changed=changed)
                self._users = users
            gone = {
                name: node
                for name, (key, node) in self._nodes.items()
                if name not in sites or sites[name][0] != key
            }
            new = {
                name: key
                for name, (key, _) in sites.items()
                if name in gone or name not in self._nodes
            }
            if (gone or new) and self._env is not None:
                if not self._answers():
                    raise PilotError("the SuperLink is being started")
                commands = FlowerCommands(self._sites, self._env)
                with contextlib.closing(commands):
                    self._change(commands, gone, new)

    def _change(self, commands: FlowerCommands, gone: dict[str, str], new: dict[str, str]) -> None:
        for name, node in gone.items():
            if node:
                _flwr(commands, "unregister", node, CONNECTION)
            del self._nodes[name]
            self._say(f"site {name} is shut out")
        for name, key in new.items():
            public = str(self._sites / name / "node.pub")
            found, said = _flwr(commands, "register", public, CONNECTION, "--name", name)
            if "node-id" not in found and _ALREADY not in said.lower():
                raise PilotError(
                    f"Flower did not register site {name}: {said[-300:] or 'no output'}"
                )
            self._nodes[name] = (key, str(found.get("node-id", "")))

    def _read(self) -> dict[str, tuple[str, str]]:
        """Public key and hash of the Redis password of each site."""
        found = {}
        for directory in sorted(self._sites.iterdir()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                check_name(directory.name, "site")
                hashed = json.loads(read_secret(directory / "redis.json"))["hash"]
                found[directory.name] = (read_secret(directory / "node.pub").decode(), str(hashed))
        return found

    def remove(self, name: str) -> None:
        """Shut a site out, at the next look."""
        shutil.rmtree(self._sites / name, ignore_errors=True)


def _flwr(commands: FlowerCommands, *words: str) -> tuple[dict[str, Any], str]:
    """(the answer in JSON, all output) of `flwr supernode …`."""
    command = commands.start(["supernode", *words, "--format", "json"], errors=True)
    assert command.stdout is not None
    with command.stdout as output:
        said = output.read()
    command.wait()
    with contextlib.suppress(ValueError):
        found = json.loads(said[said.index("{") : said.rindex("}") + 1])
        if isinstance(found, dict):
            return found, " ".join(said.split())
    return {}, " ".join(said.split())


def answer_join(
    request: dict[str, Any], members: Members, take: Callable[[bytes, str], None]
) -> dict[str, Any]:
    """Admit the site that asks; what it needs, or {"error": sentence}. `take` uses its token."""
    try:
        name, key = str(request["name"]), str(request["key"])
        check_name(name, "--name")
        check_site_key(key)
        take(bytes.fromhex(str(request["secret"])), name)
        password = members.admit(name, key)
    except (KeyError, ValueError, TokenRefused) as error:
        return {"error": f"{error}"}
    return {"redis_user": user_of(name), "redis_password": password}
