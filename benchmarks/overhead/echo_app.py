"""A Flower app that does nothing but send bytes: what Flower itself needs for messages of that size.

A file of its own, since it is all that the app's bundle holds; `flower.py` submits it.
"""

import json
import os
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

_POLL_S = 0.25  # as often as Pilot's server looks
_BLOCK = 1 << 20

client = ClientApp()
server = ServerApp()


def _record(num_bytes: int) -> ArrayRecord:
    """Bytes of which no two parts are alike: Flower sends equal ones only once. Cheap to make."""
    block, data = os.urandom(min(_BLOCK, num_bytes) or 1), bytearray(num_bytes)
    for first in range(0, num_bytes, _BLOCK):
        end = min(num_bytes, first + _BLOCK)
        data[first:end] = block[: end - first]
        data[first : first + 8] = first.to_bytes(8, "big")[: end - first]
    return ArrayRecord({"x": Array("uint8", (num_bytes,), "echo", bytes(data))})


@client.train()
def train(message: Message, context: Context) -> Message:
    content = RecordDict({"x": _record(int(str(message.content["config"]["up"])))})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    clients, rounds = int(config["clients"]), int(config["rounds"])
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(_POLL_S)
    seconds = []
    for _ in range(rounds):
        down = _record(int(config["bytes-down"]))
        began = time.monotonic()
        ask = RecordDict({"x": down, "config": ConfigRecord({"up": int(config["bytes-up"])})})
        # one by one, as Pilot's server sends them
        waiting = {i for node in nodes for i in grid.push_messages([Message(ask, node, "train")])}
        pushed_s = time.monotonic() - began
        while waiting:
            time.sleep(_POLL_S)
            for reply in grid.pull_messages(list(waiting)):
                if reply.has_error():
                    raise RuntimeError(f"Flower error {reply.error.code}: {reply.error.reason}")
                waiting.discard(reply.metadata.reply_to_message_id)
        seconds.append({"dispatch_s": pushed_s, "round_s": time.monotonic() - began})
    path = Path(str(config["out"]))
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(seconds), encoding="utf-8")
    unfinished.rename(path)
