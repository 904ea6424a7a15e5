"""What a provisioner must know after its own death: written whole, read at its start."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.files import atomic_write_json
from pilot.errors import PilotError
from pilot.provision.books import Account
from pilot.provision.life import Phase, Record
from pilot.provision.policy import Memory

_VERSION = 1
FILE_NAME = "state.json"


@dataclass
class State:
    """`first_start_s`: where relative traces begin; `until_s`: up to when accounts are complete;
    `offset`: up to where the run's events have been read. Seconds of the wall clock."""

    run: str
    first_start_s: float
    until_s: float
    offset: int | None = None
    records: dict[str, Record] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Raises OSError."""
        document = {
            "version": _VERSION,
            "run": self.run,
            "first_start_s": self.first_start_s,
            "until_s": self.until_s,
            "offset": self.offset,
            "clients": {
                name: {**asdict(record), "account": self.accounts[name].to_json()}
                for name, record in self.records.items()
            },
        }
        atomic_write_json(directory / FILE_NAME, document)


def read_state(directory: Path, run: str, now_s: float) -> State:
    """The state in `directory`, or a new one. Raises PilotError for a file that is none of ours."""
    path = directory / FILE_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return State(run, now_s, now_s)
    except (OSError, ValueError) as error:
        raise PilotError(f"cannot read {path} ({error}): restore it, or remove it") from error
    try:
        if document["version"] != _VERSION or document["run"] != run:
            raise ValueError("another version, or another run")
        state = State(
            run,
            float(document["first_start_s"]),
            float(document["until_s"]),
            document["offset"],
        )
        for name, values in document["clients"].items():
            state.accounts[name] = Account.from_json(values.pop("account"))
            state.records[name] = _record(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PilotError(
            f"{path} is not this command's ({error}): restore it, or remove it"
        ) from error
    return state


def _record(values: Mapping[str, Any]) -> Record:
    return Record(
        **{
            **values,
            "phase": Phase(values["phase"]),
            "memory": Memory(**values["memory"]),
            "fence": (int(values["fence"][0]), int(values["fence"][1])),
        }
    )
