"""Python commands that start in milliseconds: forks of a process that has imported torch and the packages once.

`Zygote.start(["-m", "scripts.base_train", …])` is what `subprocess.Popen([sys.executable, "-m", …])` is: a
process of its own with its own environment, directory and standard streams, which can be killed, and which
exits as an interpreter does. What it can't show is what an interpreter imports, or how long that takes.

`python -m zygote SOCKET` serves: a connection brings one job (JSON) and the three standard streams, and gets
the pid, then the exit code.
"""

import contextlib
import io
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

from pilot.processes.scratch import free_port

TESTS = Path(__file__).resolve().parent
PRELOAD = (
    *("torch", "torch.distributed", "numpy", "pyarrow.parquet", "safetensors.torch", "tqdm"),
    *("nanochat.pretrain", "nanochat.core_eval", "nanochat.engine", "nanochat.loss_eval"),
    *("nanochat.rows.prepare", "rustbpe"),
)
_START_S = 120.0


class Child:
    """A forked command; `stdout` and `stderr` are text streams where a pipe was asked for."""

    def __init__(self, connection: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None):
        self._connection = connection
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        self._reading = threading.Lock()  # one thread may wait for its end while another asks
        self.pid = int(self._line())

    def _line(self) -> str:
        """The next line that the zygote says; "" if it has said none within the socket's time-out."""
        line = b""
        while not line.endswith(b"\n") and (byte := self._connection.recv(1)):
            line += byte
        return line.decode()

    def poll(self) -> int | None:
        if self._reading.acquire(blocking=False):  # else another thread waits, so it has not ended
            try:
                if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
                    self._read_end(None)
            finally:
                self._reading.release()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the signal that ended it. Raises TimeoutError."""
        with self._reading:
            if self.returncode is None:
                self._read_end(timeout)
        assert self.returncode is not None
        return self.returncode

    def _read_end(self, timeout: float | None) -> None:
        self._connection.settimeout(timeout)
        line = self._line()
        assert line, "the zygote is gone"
        self.returncode = int(line)
        self._connection.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ends at this moment
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of its output, and its end."""
        deadline = time.monotonic() + (timeout or 1e6)
        texts = [b"", b""]
        with selectors.DefaultSelector() as selector:
            for place, stream in enumerate((self.stdout, self.stderr)):
                if stream is not None:
                    selector.register(stream.fileno(), selectors.EVENT_READ, place)
            while selector.get_map():
                for key, _ in selector.select(deadline - time.monotonic()):
                    if not (read := os.read(key.fd, 65536)):
                        selector.unregister(key.fd)
                    texts[key.data] += read
                if time.monotonic() > deadline:
                    raise TimeoutError("the command still runs")
        self.wait(deadline - time.monotonic())
        return texts[0].decode(), texts[1].decode()


class Zygote:
    """Starts commands; a context manager. Its processes end with it at the latest."""

    def __enter__(self) -> "Zygote":
        self._directory = tempfile.TemporaryDirectory()
        self._path = f"{self._directory.name}/zygote"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "zygote", self._path],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._directory.cleanup()

    def start(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = TESTS.parent,
        output: IO[bytes] | None = None,
        stderr_to_stdout: bool = False,
        new_session: bool = False,
    ) -> Child:
        """A Python process with these arguments (`-m MODULE …`, or a script's path and its own).

        Its output goes to pipes, the child's `stdout` and `stderr`, or to the file `output`.
        """
        job = {
            "arguments": [str(word) for word in arguments],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd),
            "new_session": new_session,
        }
        out, into_out = (None, os.dup(output.fileno())) if output else os.pipe()
        err, into_err = (None, into_out) if output or stderr_to_stdout else os.pipe()
        connection = self._connect()
        message = json.dumps(job).encode()
        with open(os.devnull, "rb") as nothing:
            descriptors = [nothing.fileno(), into_out, into_err]
            socket.send_fds(connection, [len(message).to_bytes(8, "big")], descriptors)
        connection.sendall(message)
        for descriptor in {into_out, into_err}:
            os.close(descriptor)
        streams = [None if pipe is None else os.fdopen(pipe) for pipe in (out, err)]
        return Child(connection, *streams)

    def run(
        self, arguments: Sequence[str | Path], **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Start it and wait for its end."""
        child = self.start(arguments, **options)
        out, err = child.communicate()
        return subprocess.CompletedProcess(list(arguments), child.wait(), out, err)

    def ranks(
        self, arguments: Sequence[str | Path], world_size: int, *, env: Mapping[str, str]
    ) -> "list[subprocess.CompletedProcess[str]]":
        """`world_size` processes that find one another as torchrun's do; if one fails, the others are ended."""
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = [
            self.start(arguments, env={**env, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world_size)
        ]
        with ThreadPoolExecutor(world_size) as pool:
            outputs = [pool.submit(child.communicate) for child in children]
            for output in as_completed(outputs):
                output.result()
                if any(child.returncode for child in children):
                    for child in children:
                        child.send_signal(signal.SIGTERM)
        return [
            subprocess.CompletedProcess(list(arguments), child.wait(), *output.result())
            for child, output in zip(children, outputs, strict=True)
        ]

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + _START_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
                return connection
            except OSError:
                connection.close()
                assert self._server.poll() is None, "the zygote has ended"
                assert time.monotonic() < deadline, "the zygote does not start"
                time.sleep(0.05)


def _serve(path: str) -> dict[str, Any]:
    """Fork a process for each job. Returns the job in the child, and never in the server."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, woken, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in ready:  # closed: nobody wants anything any more
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            if woken in ready:
                woken.recv(4096)
                _reap(children)
            if listener in ready:
                connection, _ = listener.accept()
                header, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
                job = json.loads(connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for number, descriptor in enumerate(descriptors):
                        os.dup2(descriptor, number)
                    for mine in (listener, woken, waker, connection, *children.values()):
                        mine.close()
                    for descriptor in descriptors:
                        os.close(descriptor)
                    return job  # type: ignore[no-any-return]
                for descriptor in descriptors:
                    os.close(descriptor)
                children[pid] = connection
                connection.sendall(f"{pid}\n".encode())


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as connection, contextlib.suppress(OSError):
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(job: dict[str, Any]) -> None:
    """Run the job's command as a new interpreter would."""
    if job["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, io.TextIOWrapper(open(number, "wb", 0), write_through=True))  # noqa: SIM115
    first, *rest = job["arguments"]
    sys.path = [place for place in sys.path if place != str(TESTS)]
    if first == "-m":
        sys.argv = [rest[0], *rest[1:]]
        sys.path.insert(0, job["cwd"])
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _main() -> None:
    from pilot.processes.keeper import die_with_parent

    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for module in PRELOAD:
        __import__(module)
    job = _serve(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _become(job)
    except Exception:  # noqa: BLE001 - printed, as an interpreter does at its end
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _main()
