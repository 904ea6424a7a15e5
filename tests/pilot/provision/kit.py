"""Stand-ins: a service that serves JSON, a hook that does what a test says, a clock that a test moves."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pilot.provision.hooks import Condition, Look


@dataclass
class Service:
    """`answers`: path → (status, body, headers); a body that is no string is sent as JSON. `asked`: (path with
    query, headers) of all requests."""

    url: str = ""
    answers: dict[str, tuple[int, Any, dict[str, str]]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def serve(self, path: str, body: Any, status: int = 200, **headers: str) -> None:
        self.answers[path] = (status, body, headers)


@contextmanager
def service() -> Iterator[Service]:
    found = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            missing: tuple[int, Any, dict[str, str]] = (404, "", {})
            status, body, headers = found.answers.get(self.path.partition("?")[0], missing)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class FakeHook:
    """Does nothing; `condition` is what the test says."""

    condition: Condition = Condition.RUNNING
    calls: list[str] = field(default_factory=list)
    why: str = ""

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def kill(self) -> None:
        self.calls.append("kill")

    def look(self) -> Look:
        return Look(self.condition, self.why)

    def saved(self) -> dict[str, Any]:
        return {}


@dataclass
class FakeClock:
    now: float = 1_000_000.0

    def now_s(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
