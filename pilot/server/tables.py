"""The tables of a run and the line of a round, as text for people: its rounds, and where its time went."""

from collections.abc import Mapping
from dataclasses import asdict

from pilot.rules.accounts import ClientAccount, RunAccount, totals
from pilot.run.state import RunState

# In the order in which a round has them, by `idle.Cause`; waiting for somebody comes last.
_PHASES = ["dispatch", "start", "evaluation", "packing", "training", "replies", "merge", "snapshot"]
_SHOWN_S = 0.05  # what is shorter is 0.0 in one decimal
_COLUMNS = ["start", "load", "evaluation", "packing", "training", "encoding", "sending"]


def round_table(state: RunState) -> str:
    """All rounds of the run, one per line."""
    lines = ["round  clients      tokens  train loss  val bpb  seconds  ended by"]
    wanted = state.config.eval_rows
    for record in state.history:
        loss = "-" if record.train_loss is None else f"{record.train_loss:.4f}"
        bpb = "-" if record.val_bpb is None else f"{record.val_bpb:.4f}"
        notes = [f"{record.refused} refused"] if record.refused else []
        if record.val_bpb is not None and record.eval_rows != wanted:
            notes.append(f"val bpb of {record.eval_rows} of {wanted} rows only")
        notes += ["taken back"] if record.taken_back else []
        note = f" ({', '.join(notes)})" if notes else ""
        lines.append(
            f"{record.round_number:5d}  {record.clients:7d}  {record.tokens:10,d}  {loss:>10}  "
            f"{bpb:>7}  {record.duration_s:7.1f}  {record.reason}{note}"
        )
    return "\n".join(lines)


def round_line(phases: Mapping[str, float], accounts: Mapping[str, ClientAccount]) -> str:
    """`phases`: seconds by what the federation did; `accounts`: client → its part."""
    parts = [f"{name} {s:.1f}" for name, s in _in_order(phases).items() if s >= _SHOWN_S]
    sums = totals(phases, accounts.values())
    line = f"{sums['round_s']:.1f} s: {', '.join(parts)}"
    line += f"; down {size(sums['bytes_down'])}, up {size(sums['bytes_up'])}"
    return line if sums["goodput"] is None else f"{line}; goodput {sums['goodput']:.1%}"


def time_table(account: RunAccount) -> str:
    """The whole run: phases of the federation, then one line per client."""
    whole_s = sum(account.phases.values())
    if not whole_s:
        return ""
    lines = ["where the time went     seconds   share"]
    for name, seconds in _in_order(account.phases).items():
        lines.append(f"{name:<20}  {seconds:9.1f}  {seconds / whole_s:6.1%}")
    lines += [f"{'all':<20}  {whole_s:9.1f}  {1:6.1%}", ""]
    width = max(len("client"), *(len(name) for name in account.clients), len("all"))
    head = "  ".join(f"{name:>10}" for name in _COLUMNS)
    lines.append(f"{'client':<{width}}  goodput  {head}        down          up   (seconds)")
    for name, client in account.clients.items():
        spent = asdict(client.spent)
        cells = "  ".join(f"{spent[f'{column}_s']:10.1f}" for column in _COLUMNS)
        sizes = f"{size(client.bytes_down):>10}  {size(client.bytes_up):>10}"
        lines.append(f"{name:<{width}}  {client.goodput:7.1%}  {cells}  {sizes}")
    if account.goodput is not None:
        lines.append(f"{'all':<{width}}  {account.goodput:7.1%}")
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """In the unit that shows three or four digits."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] != "B" else f"{num_bytes:.0f} B"


def _in_order(phases: Mapping[str, float]) -> dict[str, float]:
    known = {name: phases[name] for name in _PHASES if name in phases}
    return known | {str(name): seconds for name, seconds in phases.items() if name not in known}
