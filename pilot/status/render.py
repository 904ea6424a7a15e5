"""A status as text for a terminal. Pure: from a `Status` to what rich draws."""

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pilot.status.runs import RunLine
from pilot.status.value import ClientStatus, Status

_NONE = "-"  # nothing says
# Seconds of a unit of time, its name, and the same of the next smaller one
_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
_COLOURS = {
    "running": "green",
    "training": "green",
    "finished": "green",
    "silent": "red",
    "killed": "red",
    "lost": "red",
    "cooling": "red",
    "drained": "yellow",
    "leaving": "yellow",
    "stopping": "yellow",
    "stopped": "yellow",
}
# Above its columns, a client's line has: what it is called there, and how it is read
_CLIENT_COLUMNS: Sequence[tuple[str, Callable[[ClientStatus], str]]] = (
    ("tokens/s", lambda c: number(c.tokens_per_s)),
    ("MFU", lambda c: share(c.mfu)),
    ("loss", lambda c: _NONE if c.loss is None else f"{c.loss:.3f}"),
    ("step", lambda c: _NONE if c.step is None else str(c.step)),
    ("shard", lambda c: _NONE if c.shard is None else f"{c.shard} ({share(c.shard_share)})"),
    ("heartbeat", lambda c: _NONE if c.heartbeat_s is None else f"{c.heartbeat_s:.0f} s ago"),
    ("goodput", lambda c: share(c.goodput)),
    ("down", lambda c: size(c.bytes_down)),
    ("up", lambda c: size(c.bytes_up)),
    ("merged", lambda c: _NONE if c.merged_rounds is None else str(c.merged_rounds)),
    ("refused", lambda c: _NONE if c.refused is None else str(c.refused)),
    ("device", lambda c: device(c)),
)


def render(status: Status) -> RenderableType:
    """The run, its clients, what was refused, and what is not known."""
    parts: list[RenderableType] = [_head(status), *(Text(line) for line in _figures(status))]
    if status.clients:
        parts.append(_clients(status.clients))
    for one in status.refusals:
        when = "" if one.age_s is None else f", {duration(one.age_s)} ago"
        where = "" if one.round_number is None else f" (round {one.round_number}{when})"
        parts.append(Text(f"refused: {one.client or 'nobody knows whose'}{where}: {one.reason}"))
    parts += [Text(f"not known: {sentence}", style="dim") for sentence in status.unknown]
    return Group(*parts)


def render_runs(lines: Iterable[RunLine]) -> RenderableType:
    """One run a line."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "state", "round", "tokens", "of", "last heard", "where"):
        table.add_column(column, justify="right" if column in ("round", "tokens", "of") else "left")
    for line in lines:
        table.add_row(
            Text(line.run),
            word(line.state),
            _NONE if line.round_number is None else str(line.round_number),
            number(line.tokens),
            number(line.total_tokens),
            _NONE if line.last_s is None else f"{duration(line.last_s)} ago",
            Text(line.where),
        )
    return table


def _head(status: Status) -> Text:
    text = Text.assemble("run ", (status.run, "bold"), "  ", word(status.state))
    return text.append(f" ({status.why})") if status.why else text


def _figures(status: Status) -> list[str]:
    of = f" of {status.num_rounds}" if status.num_rounds else ""
    number_ = _NONE if status.round_number is None else str(status.round_number)
    first = [f"round {number_}{of}"]
    first += [status.phase] if status.phase else []
    if status.round_left_s is not None:
        first.append(f"{duration(status.round_left_s)} left of it")
    if status.eta_s is not None:
        first.append(f"the run ends in about {duration(status.eta_s)}")
    total = f" of {number(status.total_tokens)}" if status.total_tokens else ""
    second = [f"tokens {number(status.tokens)}{total}"]
    if status.round_tokens:
        second.append(f"{number(status.round_tokens)} more in this round")
    if status.tokens_per_s:
        second.append(f"{number(status.tokens_per_s)}/s")
    if status.shards:
        done, complete, shards = status.shards
        second.append(f"shards {complete} of {shards} complete, {share(done)} of the rows")
    third = [f"goodput {share(status.goodput)}"]
    third.append(f"down {size(status.bytes_down)}, up {size(status.bytes_up)}")
    third.append(f"refused replies {_NONE if status.refused is None else status.refused}")
    if status.train_loss is not None:
        third.append(f"loss {status.train_loss:.4f}")
    if status.val_bpb is not None:
        third.append(f"val bpb {status.val_bpb:.4f}")
    return [" · ".join(first), " · ".join(second), " · ".join(third)]


def _clients(clients: Sequence[ClientStatus]) -> Table:
    """Without the columns of which nothing is known of any client."""
    columns = [(n, get) for n, get in _CLIENT_COLUMNS if any(get(c) != _NONE for c in clients)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("client")
    table.add_column("state")
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "device" else "right")
    for client in clients:
        state = word(client.state or _NONE)
        if client.why:
            state.append(f" ({client.why})")
        table.add_row(Text(client.name), state, *(Text(get(client)) for _, get in columns))
    return table


def word(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, ""))


def device(client: ClientStatus) -> str:
    if not client.device:
        return _NONE
    count = f"{client.devices} × " if client.devices and client.devices > 1 else ""
    return f"{count}{client.device}" + (f" on {client.host}" if client.host else "")


def number(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}%"


def size(value: int | None) -> str:
    """Bytes, in powers of 1000."""
    if value is None:
        return _NONE
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def duration(seconds: float) -> str:
    """As people say it: 42 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    for unit, name, small, below in _UNITS:
        if whole >= unit:
            rest = whole % unit // small
            return f"{whole // unit} {name}" + (f" {rest} {below}" if rest else "")
    raise AssertionError(seconds)
