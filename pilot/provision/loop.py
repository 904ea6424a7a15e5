"""A provisioner: looks at signals, decides, leads its clients' lives, keeps the books.

Everything that must outlive it is in its state, so it may be killed and started again at any time, as may the
server; clients are programs of their own and live on.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pilot.coordination.provisioner import ProvisionerCoordinator, RunKeys
from pilot.errors import PilotError
from pilot.provision.board import Board
from pilot.provision.books import Account, hourly, totals, unknown
from pilot.provision.config import ClientConfig, Config, open_source
from pilot.provision.hooks import CommandHook, Commands, Hook, Place, SubprocessHook
from pilot.provision.life import Life, Patience, Phase, Record
from pilot.provision.log import EventLog, Follower
from pilot.provision.policy import Decision, Fact, Memory, Own, Wish, by_signal, decide
from pilot.provision.readings import SignalAway
from pilot.provision.state import State
from pilot.rules.rounds import Clock

ENERGY_EVERY_S = 60.0
_LEAVING = (Phase.DRAINING, Phase.STOPPING)
_PRESENT = ("client_joined", "reply")  # events of the server that name one client which is there


@dataclass
class Provisioner:
    """`clock` is the wall clock's; `directory` holds the state and the hooks' logs."""

    config: Config
    state: State
    directory: Path
    fleet: ProvisionerCoordinator
    log: EventLog
    follower: Follower
    clock: Clock
    ending: str = ""  # why all clients are to stop; "" while the policy decides
    _board: Board = field(init=False)
    _lives: dict[str, Life] = field(init=False)
    _owns: dict[str, Own] = field(init=False, default_factory=dict)
    _next_energy_s: float = field(init=False, default=0.0)
    _next_status_s: float = field(init=False, default=0.0)
    _shown: tuple[str, ...] = field(init=False, default=())
    _failing: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        sources = {
            name: open_source(options, f"[signals.{name}]", self.state.first_start_s)
            for name, options in self.config.signals.items()
        }
        self._board = Board(sources, self.config.signals, self._tell_signal)
        for name in list(self.state.records):
            if name not in self.config.clients:
                self._forget(name)
        for name in self.config.clients:
            self.state.records.setdefault(name, Record())
            self.state.accounts.setdefault(name, Account())
        self._lives = {name: self._life(one) for name, one in self.config.clients.items()}

    def _forget(self, name: str) -> None:
        """A client that is no longer configured; what it took stays in the books."""
        if self.state.records[name].exists:
            raise PilotError(
                f"client {name} may still run, but the configuration no longer names it: put "
                f"[clients.{name}] back until it is off"
            )

    def _life(self, client: ClientConfig) -> Life:
        record, options = self.state.records[client.name], client.options
        place = Place(self.directory, self.config.run, client.name)
        hook: Hook
        if options.hook == "subprocess":
            hook = SubprocessHook(place, options.start, options.environment, record.hook)
        else:
            commands = Commands(
                options.start,
                options.stop,
                options.status,
                options.environment,
                options.start_within,
                options.stop_within,
            )
            hook = CommandHook(place, commands, started=record.exists and record.started)
        patience = Patience(options.start_within, options.drain_within, options.stop_within)
        return Life(client.name, record, hook, self.fleet, patience, self._tell_client, self.save)

    # -- the loop --------------------------------------------------------------------------------

    def run(self, ends: Callable[[], bool]) -> None:
        """Until `ends` (asked between two looks), or all is over."""
        while not ends() and not self.tick():
            self.clock.sleep(self.config.every_s)
        self.report_energy()
        self.save()

    def tick(self) -> bool:
        """One look at everything, and what follows from it. True once there is nothing left to do."""
        now_s = self.clock.now_s()
        passed_s = max(0.0, now_s - self.state.until_s)
        run = self.fleet.look(self.config.clients)
        self._board.read(now_s)
        present = self._follow()
        self._account(now_s, run)
        finished = run is not None and run.state == "finished"
        if finished and not self.ending and self.config.stop_when_finished:
            self.ending = "the run is finished"
        self._decide(now_s, run)
        for name, life in self._lives.items():
            life.step(now_s, passed_s, run, name in present)
        if now_s >= self._next_energy_s:
            self._next_energy_s = now_s + ENERGY_EVERY_S
            self.report_energy()
        self._show(now_s)
        nobody = not any(record.exists for record in self.state.records.values())
        if finished and not self.config.stop_when_finished:
            return True
        return nobody and bool(self.ending)

    def _follow(self) -> set[str]:
        """Clients that the server has named since the last look; counts the tokens that were merged."""
        present = set()
        with contextlib.suppress(OSError):
            for event in self.follower.read():
                kind, client = event.get("event"), event.get("client")
                if kind == "round_opened" and isinstance(event.get("clients"), list):
                    present |= {name for name in event["clients"] if isinstance(name, str)}
                elif kind in _PRESENT and isinstance(client, str):
                    present.add(client)
                    tokens = event.get("tokens")
                    if kind == "reply" and client in self.state.accounts and type(tokens) is int:
                        self.state.accounts[client].tokens += tokens
        self.state.offset = self.follower.offset
        return present

    def _account(self, now_s: float, run: RunKeys | None) -> None:
        for name, client in self.config.clients.items():
            account = self.state.accounts[name]
            if not self.state.records[name].exists:
                account.busy = False
                continue
            busy = account.busy if run is None else run.clients[name].busy
            account.add(client, self._board, self.state.until_s, now_s, busy=busy)
        self.state.until_s = now_s

    # -- deciding --------------------------------------------------------------------------------

    def _decide(self, now_s: float, run: RunKeys | None) -> None:
        self._owns = {name: self._own(one, now_s) for name, one in self.config.clients.items()}
        facts = list(self._facts(run))
        total, _ = totals(self.state.accounts)
        found = decide(facts, self.config.limits, grams=total.grams, money=total.money, now_s=now_s)
        changed = False
        for name, decision in found.items():
            record = self.state.records[name]
            if self.ending:
                decision = Decision(False, self.ending)
            record.why = decision.why
            if record.run != decision.run:
                record.run, record.decided_s, changed = decision.run, now_s, True
                record.reason = decision.why
                if decision.run:
                    record.attempts, record.not_before_s = 0, 0.0
                if record.exists or decision.run:
                    self._tell_client(name, "start" if decision.run else "drain", decision.why)
        if changed:
            self.save()

    def _own(self, client: ClientConfig, now_s: float) -> Own:
        """What the client's signal asks for; remembers since when."""
        record, name = self.state.records[client.name], client.options.signal
        reading = self._board.current(name)
        if reading is None:
            record.memory = Memory()
            fallback = Wish(self.config.signals[name].when_away)
            return Own(fallback, f"{name} is away: {self._board.trouble.get(name, 'no reading')}")
        thresholds = client.thresholds
        record.memory = record.memory.after(reading.value, thresholds, now_s)
        until_s = None
        if thresholds.min_window_s and not record.run:
            with contextlib.suppress(SignalAway):
                until_s = self._board.sources[name].holds_until_s(now_s, *thresholds.range)
        return by_signal(
            reading,
            record.memory,
            thresholds,
            running=record.run,
            until_s=until_s,
            now_s=now_s,
        )

    def _facts(self, run: RunKeys | None) -> Iterator[Fact]:
        for name, client in self.config.clients.items():
            record = self.state.records[name]
            grams, money = hourly(client, self._board)
            yield Fact(
                name=name,
                own=self._owns[name],
                running=record.run,
                since_s=record.decided_s,
                min_on_s=client.thresholds.min_on_s,
                held="" if run is None else run.clients[name].held,
                grams_per_hour=grams,
                money_per_hour=money,
            )

    # -- telling ---------------------------------------------------------------------------------

    def _tell_client(self, client: str, action: str, why: str) -> None:
        self.log.event(
            "provision", f"{client}: {action} ({why})", client=client, action=action, reason=why
        )

    def _tell_signal(self, signal: str, state: str, why: str) -> None:
        self.log.event(
            "provision_signal",
            f"signal {signal} is {state}: {why}",
            signal=signal,
            state=state,
            reason=why,
        )

    def report_energy(self) -> None:
        """What each client took since it was last said, as events; the state first: a crash in between
        loses an event, and counts nothing twice."""
        new = {name: account.unreported() for name, account in self.state.accounts.items()}
        if not any(new.values()):
            return
        self.save()
        for name, values in new.items():
            client = self.config.clients.get(name)
            if values and client is not None:
                # what nothing says is missing, not 0
                values = {what: values[what] for what in values.keys() - unknown(client)}
                self.log.event("energy", "", client=name, **values)

    def status(self) -> str:
        """One line: who is how far and why, and what the run took."""
        parts = []
        for phase in (Phase.ON, Phase.STARTING, Phase.DRAINING, Phase.STOPPING, Phase.OFF):
            names = [
                f"{name} ({record.reason if phase in _LEAVING else record.why})"
                for name, record in self.state.records.items()
                if record.phase == phase and name in self.config.clients
            ]
            if names:
                parts.append(f"{phase}: {', '.join(names)}")
        total, tokens = totals(self.state.accounts)
        took = f"{total.kwh:.4g} kWh, {total.grams:.4g} g, {total.money:.4g} money"
        if (per := total.grams_per_million_tokens(tokens)) is not None:
            took += f", {per:.4g} g per million tokens"
        return f"{'; '.join(parts)}; {took}"

    def _show(self, now_s: float) -> None:
        """The status, every so often and whenever a client's phase has changed."""
        phases = tuple(str(record.phase) for record in self.state.records.values())
        if now_s < self._next_status_s and phases == self._shown:
            return
        self._next_status_s, self._shown = now_s + self.config.status_every_s, phases
        total, tokens = totals(self.state.accounts)
        clients = {
            name: {"phase": record.phase, "reason": record.why}
            for name, record in self.state.records.items()
        }
        self.log.show(
            "provision_status",
            self.status(),
            clients=clients,
            kwh=total.kwh,
            grams=total.grams,
            money=total.money,
            tokens=tokens,
            grams_per_million_tokens=total.grams_per_million_tokens(tokens),
        )
        self.save()

    def save(self) -> None:
        """A disk that refuses it costs one sentence: the clients matter more."""
        try:
            self.state.write(self.directory)
            self._failing = False
        except OSError as error:
            if not self._failing:
                self.log.event(
                    "provision_trouble", f"the state cannot be written: {error.strerror}"
                )
            self._failing = True
