"""What is said of clients that come, and of wishes that reach a run through Redis; a part of `report.py`."""

from pilot.server.telemetry import Telemetry
from pilot.wire.messages import HelloReply


class WishReport:
    """One method per client that comes, and per wish that comes or goes."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry

    def client_accepted(self, name: str, hello: HelloReply) -> None:
        what = f"joined: {hello.host}, {hello.devices} × {hello.device_name}, {len(hello.shards)} shards"
        self.telemetry.event(
            "client_accepted",
            f"Client {name} {what}",
            client=name,
            host=hello.host,
            devices=hello.devices,
            device_name=hello.device_name,
        )

    def run_stopping(self, number: int, reason: str) -> None:
        """An operator wishes the run to end after the round that is open, or now if none is."""
        text = f"The run is asked to stop ({reason}): what its clients have is merged first"
        self.telemetry.event("run_stopping", text, round=number, reason=reason)

    def client_drained(self, number: int, name: str, reason: str) -> None:
        text = f"Client {name} is drained ({reason}): it gets no work until it is undrained"
        self.telemetry.event("client_drained", text, round=number, client=name, reason=reason)

    def client_undrained(self, number: int, name: str) -> None:
        text = f"Client {name} is undrained: it may work again"
        self.telemetry.event("client_undrained", text, round=number, client=name)
