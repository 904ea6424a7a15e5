"""CONFIG.toml of `pilot provision`: read whole and checked before anything starts."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilot.config import check_name
from pilot.errors import ConfigError
from pilot.provision import remote, signals
from pilot.provision.policy import Limits
from pilot.provision.readings import Source
from pilot.provision.signals import OPEN, SignalOptions
from pilot.provision.tables import TABLE, key, read_table
from pilot.rules.energy import PowerModel
from pilot.rules.thresholds import Thresholds

_HOOKS = ("subprocess", "command")
_PER = ("kwh", "hour")
KINDS: dict[str, type[SignalOptions]] = {
    "trace": signals.TraceOptions,
    "file": signals.FileOptions,
    "calendar": signals.CalendarOptions,
    "nvml": signals.NvmlOptions,
    "http": remote.HttpOptions,
    "electricity-maps": remote.ElectricityMapsOptions,
    "watttime": remote.WattTimeOptions,
    "vessim": remote.VessimOptions,
}


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """A client, or `[defaults]` for all of them. `start`, `stop`, `status`: commands, in which {client}
    and {run} stand for the names. Durations are seconds."""

    signal: str = key("")
    start_below: float | None = key(None)
    drain_above: float | None = key(None)
    start_above: float | None = key(None)
    drain_below: float | None = key(None)
    hold: float | None = key(None, low=0)  # 600; of a calendar 0
    min_window: float = key(0.0, low=0)
    min_on: float = key(0.0, low=0)
    # how it is started and stopped
    hook: str = key("subprocess", choices=_HOOKS)
    start: tuple[str, ...] = key(())
    stop: tuple[str, ...] = key(())
    status: tuple[str, ...] = key(())
    environment: dict[str, str] = TABLE
    start_within: float = key(1800.0, above=0)
    drain_within: float = key(900.0, above=0)
    stop_within: float = key(300.0, above=0)
    # what it takes
    idle_w: float = key(0.0, low=0)
    training_w: float = key(0.0, low=0)
    pue: float = key(1.0, low=1)
    power: str = key("")
    carbon: str = key("")
    price: str = key("")
    price_per: str = key("kwh", choices=_PER)


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    max_clients: int | None = key(None, low=1)
    min_clients: int = key(0, low=0)
    money_per_hour: float | None = key(None, above=0)
    grams_per_hour: float | None = key(None, above=0)
    money: float | None = key(None, above=0)
    grams: float | None = key(None, above=0)


@dataclass(frozen=True, kw_only=True)
class _File:
    run: str
    every: float = key(5.0, low=0.05)
    status_every: float = key(60.0, above=0)
    when_finished: str = key("stop", choices=("stop", "keep"))


@dataclass(frozen=True)
class ClientConfig:
    """A client whose options are checked."""

    name: str
    options: ClientOptions
    thresholds: Thresholds
    power: PowerModel


@dataclass(frozen=True)
class Config:
    run: str
    every_s: float
    status_every_s: float
    stop_when_finished: bool
    limits: Limits
    signals: Mapping[str, SignalOptions]
    clients: Mapping[str, ClientConfig]


def read_config(path: Path) -> Config:
    """Raises ConfigError, with one sentence. Paths of files are relative to the configuration's folder."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    tables = {name: document.pop(name, {}) for name in ("limits", "signals", "defaults", "clients")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} must be a table")
    file = read_table(_File, document, str(path))
    check_name(file.run, f"{path}: run")
    if not tables["clients"]:
        raise ConfigError(f"{path} names no client: write a table [clients.NAME] for each")
    found = {name: _signal(name, table, path.parent) for name, table in tables["signals"].items()}
    clients = {
        name: _client(name, _merged(tables["defaults"], table, name), found)
        for name, table in tables["clients"].items()
    }
    limits = Limits(**vars(read_table(LimitOptions, tables["limits"], "[limits]")))
    if limits.min_clients > min(limits.max_clients or len(clients), len(clients)):
        raise ConfigError(
            f"[limits]: min-clients is {limits.min_clients}, more than there may be clients"
        )
    return Config(
        file.run,
        file.every,
        file.status_every,
        file.when_finished == "stop",
        limits,
        found,
        clients,
    )


def _merged(defaults: dict[str, Any], table: object, name: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"[clients.{name}] must be a table")
    return {**defaults, **table}


def _signal(name: str, table: object, folder: Path) -> SignalOptions:
    where = f"[signals.{name}]"
    kind = table.get("kind") if isinstance(table, dict) else None
    if not isinstance(table, dict) or kind not in KINDS:
        raise ConfigError(f"{where} needs a kind: {', '.join(KINDS)}")
    if isinstance(file := table.get("file"), str):
        table = {**table, "file": str(folder / Path(file).expanduser())}
    return read_table(KINDS[kind], table, where)


def _client(name: str, table: dict[str, Any], found: Mapping[str, SignalOptions]) -> ClientConfig:
    where = f"[clients.{name}]"
    check_name(name, "client")
    options = read_table(ClientOptions, table, where)
    if not options.signal:
        raise ConfigError(f"{where} needs the key signal: the name of a table [signals.NAME]")
    for what in ("signal", "power", "carbon", "price"):
        named = getattr(options, what)
        if named and named not in found:
            raise ConfigError(f'{where}: {what} is "{named}", but there is no [signals.{named}]')
    if not options.start:
        raise ConfigError(f"{where} needs the key start: the command that starts it, as a list")
    if options.hook == "command" and not options.stop:
        raise ConfigError(f'{where} needs the key stop, since its hook is "command"')
    if options.hook == "subprocess" and (options.stop or options.status):
        raise ConfigError(
            f'{where}: stop and status belong to hook = "command"; a process is ended by a signal'
        )
    thresholds = _thresholds(options, found[options.signal].unit == OPEN, where)
    try:
        power = PowerModel(options.idle_w, max(options.idle_w, options.training_w), options.pue)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return ClientConfig(name, options, thresholds, power)


def _thresholds(options: ClientOptions, calendar: bool, where: str) -> Thresholds:
    """Of a calendar, which knows only 1 and 0, nothing need be said."""
    below, above = options.start_below, options.start_above
    if calendar and below is None and above is None:
        above = 1.0
    if (below is None) == (above is None):
        raise ConfigError(
            f"{where} needs either start-below or start-above: the value of its signal from which "
            "it is to run"
        )
    rising = above is not None
    start: float = above if above is not None else below  # type: ignore[assignment]
    drain = options.drain_below if rising else options.drain_above
    if (options.drain_above if rising else options.drain_below) is not None:
        raise ConfigError(
            f"{where}: drain-above goes with start-below, drain-below with start-above"
        )
    drain = start if drain is None else drain
    if (drain > start) if rising else (drain < start):
        raise ConfigError(
            f"{where}: it would be drained at {drain:g} and started at {start:g} at the same time"
        )
    hold_s = options.hold if options.hold is not None else (0.0 if calendar else 600.0)
    return Thresholds(
        start=start,
        drain=drain,
        rising=rising,
        hold_s=hold_s,
        min_window_s=options.min_window,
        min_on_s=options.min_on,
    )


def open_source(options: SignalOptions, where: str, first_start_s: float) -> Source:
    """The source that `options` describe. `first_start_s`: of the provisioner, where traces begin.

    Raises ConfigError for a file that is not there, or a variable that is not set.
    """
    match options:
        case signals.TraceOptions():
            return signals.Trace(options, first_start_s, where)
        case signals.FileOptions():
            return signals.WatchedFile(options)
        case signals.CalendarOptions():
            return signals.calendar_source(options, where)
        case signals.NvmlOptions():
            return remote.Polled(signals.Nvml(options).read, signals.NVML_EVERY_S)
        case remote.HttpOptions():
            return remote.http_source(options, where)
        case remote.ElectricityMapsOptions():
            return remote.electricity_maps_source(options, where)
        case remote.WattTimeOptions():
            return remote.watttime_source(options, where)
        case remote.VessimOptions():
            return remote.vessim_source(options, where)
    raise AssertionError(options)
