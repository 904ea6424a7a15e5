"""Where a fleet keeps what it has: `$NANOCHAT_BASE_DIR/fleet` and `…/keys`, or all below `--dir`."""

from dataclasses import dataclass
from pathlib import Path

from pilot.fleet.secret_file import private_directory
from pilot.launch.connection import base_directory

CONNECTION = "local-deployment"  # how Flower's configuration calls the fleet of this machine
_JOINED = "joined"


@dataclass(frozen=True)
class Places:
    """The directories of one fleet on this machine."""

    fleet: Path
    keys: Path

    @staticmethod
    def of(directory: Path | None) -> "Places":
        """Those of `--dir`, or the usual ones. Nothing is made."""
        if directory is None:
            return Places(base_directory() / "fleet", base_directory() / "keys")
        directory = directory.expanduser().absolute()
        return Places(directory, directory / "keys")

    def make(self) -> "Places":
        """Make those that are missing. Raises PilotError if others have access to one of them."""
        fleet = (self.fleet, self.logs, self.running, self.flower_home)
        for directory in (*fleet, self.keys, self.keys / _JOINED):
            private_directory(directory)
        return self

    @property
    def environment(self) -> Path:
        """KEY=VALUE lines that other commands on this machine need."""
        return self.fleet / "environment"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of those who run something on this fleet."""
        return self.fleet / "flwr"

    @property
    def logs(self) -> Path:
        return self.fleet / "logs"

    @property
    def running(self) -> Path:
        """Who runs here: a file for `up`, and one for each `join`."""
        return self.fleet / "running"

    @property
    def ports(self) -> Path:
        return self.fleet / "ports.json"

    @property
    def head(self) -> Path:
        """Keys and passwords of the server's side."""
        return self.keys / "head"

    def joined(self, name: str) -> Path:
        """What the head gave to the site `name`, and the site's own key."""
        return self.keys / _JOINED / name
