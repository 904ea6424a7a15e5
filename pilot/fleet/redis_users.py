"""Who may do what in a fleet's Redis: its configuration, and a user with an access list for each client.

The keys and who writes them are those of docs/protocol.md, *Redis keys*. A client reads what the server
announces, and writes its own heartbeat and stop. It runs no script: one that never ends would hold up
everybody.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

import redis

from pilot.fleet.secret_file import read_secret, write_secret

ADMIN, SERVER = "admin", "server"
_PREFIX = "pilot:*:"  # of all keys, of any run
_PASSWORD_BYTES = 24
_MAX_MEMORY = (
    "256mb"  # a run of a thousand clients has less than one; a client that fills it ends only that
)
_CONNECTION = ("hello", "auth", "ping", "select", "client|setinfo", "client|setname")
_CLIENT = (
    *("exists", "get", "hgetall"),
    *("set", "hset", "pexpire", "del"),
    *("multi", "exec", "discard", "watch", "unwatch"),
    *("subscribe", "unsubscribe"),
)
_SERVER_READS = ("round", "run", "server", "ack:{name}")
_CLIENT_WRITES = ("client:{name}", "stop:{name}")


def user_of(client: str) -> str:
    """The Redis user of a client."""
    return f"client-{client}"


def new_password() -> str:
    """A random one, of letters, digits, - and _."""
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def password_hash(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()


def client_rules(name: str, hashed: str) -> list[str]:
    """What the user of the client `name` may do, as ACL SETUSER takes it."""
    keys = [f"%R~{_PREFIX}{key.format(name=name)}" for key in _SERVER_READS]
    keys += [f"%RW~{_PREFIX}{key.format(name=name)}" for key in _CLIENT_WRITES]
    commands = [f"+{command}" for command in (*_CONNECTION, *_CLIENT)]
    return ["reset", "on", f"#{hashed}", *keys, f"&{_PREFIX}signals", "-@all", *commands]


def server_rules(hashed: str) -> list[str]:
    """The server and its operator: all keys of runs, and nothing that ends or changes the Redis itself."""
    allowed = ["+@all", "-@admin", "-@dangerous", "+info", "+config|get", "+keys"]
    return ["reset", "on", f"#{hashed}", "~pilot:*", "&pilot:*", *allowed]


def passwords(path: Path) -> dict[str, str]:
    """The passwords of ADMIN and SERVER, made at the first use. Raises PilotError if others may read them."""
    try:
        found = json.loads(read_secret(path))
        return {user: str(found[user]) for user in (ADMIN, SERVER)}
    except FileNotFoundError:
        made = {user: new_password() for user in (ADMIN, SERVER)}
        write_secret(path, json.dumps(made))
        return made


def write_configuration(directory: Path, port: int) -> Path:
    """Write what the server reads at its start besides the users; the path of it.

    It listens on the loopback interface only and keeps nothing on disk.
    """
    configuration = directory / "redis.conf"
    settings = ["daemonize no", 'save ""', "appendonly no", f'dir "{directory}"', "bind 127.0.0.1"]
    settings += [f"port {port}", f'aclfile "{_users_file(directory)}"']
    settings += [f"maxmemory {_MAX_MEMORY}", "maxmemory-policy noeviction"]
    write_secret(configuration, "\n".join(settings) + "\n")
    return configuration


def write_users(directory: Path, users: Mapping[str, str], clients: Mapping[str, str]) -> None:
    """Write the users that the server starts with: `users` are passwords of ADMIN and SERVER, `clients` the
    hashes of the clients' by name."""
    rules = {
        "default": ["reset", "off"],
        ADMIN: ["reset", "on", f"#{password_hash(users[ADMIN])}", "~*", "&*", "+@all"],
        SERVER: server_rules(password_hash(users[SERVER])),
        **{user_of(name): client_rules(name, hashed) for name, hashed in clients.items()},
    }
    lines = [f"user {user} {' '.join(words)}" for user, words in rules.items()]
    write_secret(_users_file(directory), "\n".join(lines) + "\n")


def _users_file(directory: Path) -> Path:
    return directory / "redis.users"


class Admin:
    """Changes the users of a Redis that runs, and of the next one in this directory."""

    def __init__(self, directory: Path, port: int, users: Mapping[str, str]) -> None:
        self._directory, self._users = directory, users
        self._redis = redis.Redis(
            "127.0.0.1",
            port,
            username=ADMIN,
            password=users[ADMIN],
            socket_timeout=5.0,
            decode_responses=True,
        )

    def answers(self) -> bool:
        try:
            return bool(self._redis.ping())
        except redis.RedisError:
            return False

    def users(self) -> set[str]:
        return set(self._redis.execute_command("ACL USERS"))

    def let_in(self, clients: Mapping[str, str], *, changed: Iterable[str]) -> None:
        """Let exactly these clients in, hashes of passwords by name, of which some have `changed`."""
        write_users(self._directory, self._users, clients)
        for name in changed:
            rules = client_rules(name, clients[name])
            self._redis.execute_command("ACL SETUSER", user_of(name), *rules)
        for user in self.users() - {user_of(name) for name in clients} - {ADMIN, SERVER, "default"}:
            self._redis.execute_command("ACL DELUSER", user)  # and its connections with it


def url(host: str, port: int, user: str, password: str, ca: Path | None = None) -> str:
    """What redis-py takes; with `ca`, the file of the certificate authority, over TLS."""
    shown = f"[{host}]" if ":" in host else host
    scheme, query = ("rediss", f"?ssl_ca_certs={quote(str(ca))}") if ca else ("redis", "")
    return f"{scheme}://{quote(user)}:{quote(password)}@{shown}:{port}/0{query}"
