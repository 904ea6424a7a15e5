"""The ClientApp: moves bytes between Flower and this site's worker group, and nothing else.

It imports neither torch nor nanochat: a message is a new process (FLOWER.md), and what fails in a
worker must become a reply with a reason, never an exception that Flower reports seconds later.
"""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from pilot.messages import Header, Part
from pilot.records import from_records, to_records
from pilot.worker.handle import WorkerError, WorkerHandle

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the server's hello: what this site is called, has and can do."""
    return _answer(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    return Message(answer(message.content, node_name(context)), reply_to=message)


def answer(content: RecordDict, name: str) -> RecordDict:
    """What the site called `name` says to a message, whatever happens in its worker."""
    header, parts = from_records(content)
    reply, update = _ask_worker(header, parts)
    return to_records(reply | {"node_name": name}, update)


def _ask_worker(header: Header, parts: list[Part]) -> tuple[Header, list[Part]]:
    device = str(header.get("config", {}).get("device", "auto"))
    try:
        with WorkerHandle(processes=int(header.get("processes", 1)), device=device) as worker:
            return worker.ask(header, parts)
    except (WorkerError, OSError) as error:
        return _failure(header, str(error)), []


def _failure(header: Header, sentence: str) -> Header:
    """The reply of a worker that could not give one."""
    if header.get("kind") == "HelloOrder":
        return {"kind": "HelloReply", "error": sentence}
    return {
        "kind": "TrainReply",
        "fence": header.get("fence"),
        "client": header.get("client", ""),
        "error": sentence,
    }


def node_name(context: Context) -> str:
    """What this site is called: `name` of its node config, else after its partition or node id."""
    node = context.node_config
    return str(node.get("name") or f"client_{node.get('partition-id', context.node_id)}")
