"""What people see of a run: its log lines, and the same facts as events."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from tqdm import tqdm

from nanochat.schedule import Schedule
from pilot.rules.ledger import Segment
from pilot.run.state import RoundRecord, RunState
from pilot.server.mailbox import Answer
from pilot.server.monitor import Beat
from pilot.server.open_round import OpenRound, Work
from pilot.server.roster import Site
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import TrainReply

log = logging.getLogger("pilot")


def run_started(state: RunState, term: int, telemetry: Telemetry) -> None:
    """A server has begun, with a new run or where the last one stopped."""
    run = state.config.run_name
    telemetry.event(
        "run_started", run=run, term=term, tokens=state.tokens, round=state.round_number
    )
    for change in state.config_changes:
        if change.round_number == state.round_number:  # earlier ones were told in their time
            telemetry.event(
                "config_changed",
                f"Resumed anyway: {change.key} was {change.was!r}, is {change.now!r} from round "
                f"{change.round_number + 1} on",
                **asdict(change),
            )


def round_opened(
    number: int, state: RunState, schedule: Schedule, sites: Sequence[Site], telemetry: Telemetry
) -> None:
    share, complete, shards = state.ledger.progress()
    step = state.tokens / state.config.total_batch_size
    hyper = schedule.at(step)
    log.info("")
    log.info("[ROUND %d]", number)
    log.info("Shard progress: %.1f%% (%d/%d complete)", 100 * share, complete, shards)
    log.info(
        "Round %d schedule: Step %.1f/%d, LRM %.3f, Momentum %.3f",
        number,
        step,
        round(schedule.total_steps),
        hyper.lr_multiplier,
        hyper.momentum,
    )
    log.info("Flower nodes: %s", ", ".join(f"{site.name} ({site.node_id})" for site in sites))
    log.info("configure_train: Training on all %d Flower nodes", len(sites))
    telemetry.event("round_opened", round=number, clients=[site.name for site in sites])


def progress(
    beats: Mapping[str, Beat], told: dict[str, object], *, tokens: int, elapsed_s: float
) -> None:
    """One line a client, as its own progress bar would show it; `tokens` is what each may expect.

    `told` remembers what was said of each: a client that has not moved gets no line.
    """
    for name, beat in beats.items():
        now = (beat.state, beat.step, beat.tokens)
        if told.get(name) == now:
            continue
        told[name] = now
        postfix = beat.state
        if beat.step:
            postfix = _postfix(beat.loss, beat.shard, beat.shard_row, beat.shard_rows)
        _meter(name, beat.tokens, postfix, tokens=tokens, elapsed_s=elapsed_s)


def part_done(work: Work, reply: TrainReply, state: RunState, *, elapsed_s: float) -> None:
    """The line that a client's bar ends with: a round may be over before a heartbeat was due."""
    if not reply.tokens or not reply.consumed:
        return
    last = Segment.from_list(reply.consumed[-1])
    rows = state.ledger.row_counts.get(last.shard, 0)
    postfix = _postfix(reply.loss_nats / reply.tokens, last.shard, last.end_row or 0, rows)
    _meter(work.site.name, reply.tokens, postfix, tokens=reply.tokens, elapsed_s=elapsed_s)


def _postfix(loss: float, shard: int, row: int, rows: int) -> str:
    share = 100 * row / rows if rows else 0.0
    return f"loss={loss:.4f} shard={shard} shard_progress={share:.1f}%"


def _meter(name: str, done: int, postfix: str, *, tokens: int, elapsed_s: float) -> None:
    """A client's bar at `done` of `tokens`."""
    meter = tqdm.format_meter(
        min(done, tokens),
        tokens,
        elapsed_s,
        prefix=name,
        unit="tok",
        unit_scale=True,
        postfix=postfix,
        ncols=120,
    )
    log.info("%s", meter)


def joined(number: int, site: Site, how: str, telemetry: Telemetry) -> None:
    telemetry.event(
        "client_joined",
        f"Node {site.name} joins ROUND {number}{how}",
        round=number,
        client=site.name,
    )


def refused_late(answer: Answer, telemetry: Telemetry) -> None:
    """Nobody waits for this reply: its rows have gone back long ago."""
    if answer.error:
        return
    telemetry.event(
        "reply_refused",
        "A reply is refused: it answers a round that is over",
        reason="it answers a round that is over",
        client=answer.header.get("client"),
        fence=answer.header.get("fence"),
    )


def round_ended(number: int, reason: str, telemetry: Telemetry) -> None:
    telemetry.event(
        "round_ended", f"[ROUND {number}] ended: {reason}", round=number, reason=str(reason)
    )


def round_committed(record: RoundRecord, state: RunState, telemetry: Telemetry) -> None:
    loss = "-" if record.train_loss is None else f"{record.train_loss:.4f}"
    refused = f" refused={record.refused}" if record.refused else ""
    telemetry.event(
        "round_committed",
        f"[ROUND {record.round_number}] committed: clients={record.clients} tokens={record.tokens} "
        f"train_loss={loss} total_tokens={state.tokens}{refused} ({record.duration_s:.1f} s)",
        total_tokens=state.tokens,
        merged=[asdict(reply) for reply in state.merged],
        **asdict(record),
    )
    telemetry.metrics(
        record.round_number,
        train_loss=record.train_loss,
        tokens=state.tokens,
        clients=record.clients,
        refused=record.refused,
    )


def validation(open_round: OpenRound, state: RunState, telemetry: Telemetry) -> None:
    """The replies of a round say how good the model was that the round before merged."""
    if open_round.val_bpb is None:
        return
    number, wanted = state.round_number, state.config.eval_rows
    if record := state.record(number):
        record.val_bpb, record.eval_rows = open_round.val_bpb, open_round.eval_rows
    rows = "" if open_round.eval_rows == wanted else f" ({open_round.eval_rows}/{wanted} rows)"
    telemetry.event(
        "validation",
        f"round={number} val_bpb={open_round.val_bpb:.4f}{rows}",
        round=number,
        val_bpb=open_round.val_bpb,
        eval_rows=open_round.eval_rows,
        complete=open_round.eval_rows == wanted,
    )
    telemetry.metrics(number, val_bpb=open_round.val_bpb)


def table(state: RunState) -> str:
    """All rounds of the run, a line each."""
    lines = ["round  clients      tokens  train loss  val bpb  seconds  ended by"]
    for record in state.history:
        loss = "-" if record.train_loss is None else f"{record.train_loss:.4f}"
        bpb = "-" if record.val_bpb is None else f"{record.val_bpb:.4f}"
        refused = f" ({record.refused} refused)" if record.refused else ""
        lines.append(
            f"{record.round_number:5d}  {record.clients:7d}  {record.tokens:10,d}  {loss:>10}  "
            f"{bpb:>7}  {record.duration_s:7.1f}  {record.reason}{refused}"
        )
    return "\n".join(lines)
