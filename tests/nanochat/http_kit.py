"""A real HTTP server on a free port that serves files and misbehaves as told."""

import hashlib
import http.server
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nanochat import dataset
from nanochat.download import Downloader
from nanochat.source import get_source

Handler = http.server.BaseHTTPRequestHandler


@dataclass
class FileServer:
    """`faults[name]` is a list of what to do with the next requests for a file; then it is served."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Callable[[Handler, bytes], None]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # (name, headers)
    url: str = ""
    ranges: bool = True
    announce_sha256: bool = False

    def names(self) -> list[str]:
        return [name for name, _ in self.requests]


@contextmanager
def serve() -> Iterator[FileServer]:
    state = FileServer()

    class _Handler(Handler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            state.requests.append((name, dict(self.headers)))
            data = state.files.get(name)
            if data is None:
                answer(self, 404)
            elif state.faults[name]:
                state.faults[name].pop(0)(self, data)
            else:
                send(self, data, ranges=state.ranges, announce_sha256=state.announce_sha256)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: Handler, data: bytes, *, ranges: bool, announce_sha256: bool) -> None:
    asked = handler.headers.get("Range")
    first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranges else 0
    if first >= len(data) and first:
        answer(handler, 416, {"Content-Range": f"bytes */{len(data)}"})
        return
    headers = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'} if announce_sha256 else {}
    if asked and ranges:
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
    answer(handler, 206 if asked and ranges else 200, headers, data[first:])


def answer(
    handler: Handler, status: int, headers: dict[str, str] | None = None, body: bytes = b""
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: answer(handler, code)


def body(content: bytes, **headers: str) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: answer(handler, 200, headers, content)


def cut_half_way(handler: Handler, data: bytes) -> None:
    """Announce all of it, send half, hang up."""
    answer(handler, 200, {"Content-Length": str(len(data))}, data[: len(data) // 2])
    handler.wfile.flush()
    handler.close_connection = True


def stall_half_way(until: threading.Event) -> Callable[[Handler, bytes], None]:
    def stall(handler: Handler, data: bytes) -> None:
        cut_half_way(handler, data)
        until.wait()

    return stall


def redirect(location: str) -> Callable[[Handler, bytes], None]:
    return lambda handler, data: answer(handler, 302, {"Location": location})


def download(num_train_shards: int, **options: float) -> list[str]:
    """Fetch shards as the command does, impatiently; what failed."""
    downloader = Downloader(backoff_s=0.01, **options)
    return dataset.download(get_source(), num_train_shards, workers=2, downloader=downloader)
