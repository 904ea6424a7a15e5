"""A metadata service on this machine: it answers what a test puts into it, and remembers what it was asked."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)  # by the service's clock, which is not ours
TOKEN, ACTION = "/latest/api/token", "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
NAME, EVENTS = "/metadata/instance/compute/name", "/metadata/scheduledevents"


@dataclass
class Service:
    """`items[path]` is an answer's text; a path that is not there is 404. `token`: what AWS expects."""

    items: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    token: str = "token-1"
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def paths(self) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.asked]

    def interrupts(self, left_s: float, action: str = "terminate") -> None:
        when = (NOW + timedelta(seconds=left_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.items[ACTION] = json.dumps({"action": action, "time": when})


@contextmanager
def serve() -> Iterator[Service]:
    service = Service()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            service.asked.append((self.command, self.path, headers))
            path = self.path.partition("?")[0]
            if path == TOKEN:
                given = self.command == "PUT" and headers.get(
                    "x-aws-ec2-metadata-token-ttl-seconds"
                )
                self._answer(200 if given else 400, service.token)
            elif path.startswith("/latest/"):
                known = headers.get("x-aws-ec2-metadata-token") == service.token
                self._item(path) if known else self._answer(401, "")
            else:
                self._item(path)

        do_PUT = do_GET

        def _item(self, path: str) -> None:
            if path in service.items:
                self._answer(service.status, service.items[path])
            else:
                self._answer(404, "not found")

        def _answer(self, status: int, text: str) -> None:
            self.send_response_only(status)
            headers = {"Date": format_datetime(NOW, usegmt=True), **service.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
