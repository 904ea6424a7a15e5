"""Fetch one file over HTTP so that it is there whole or not at all.

Why not huggingface_hub (2.4, installed): it writes to a file with a random name and deletes it when
the process ends, so an interrupted shard starts over, and it does not retry a 500. Here a partial
file is kept as `<name>.part` and continued with a Range request, by this process or a later one.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import requests

from nanochat.files import fsync_dir, sha256_file

_CHUNK_BYTES = 1 << 16  # what a cut connection loses at most
_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0


class DownloadError(Exception):
    """The file was not fetched; the message is one sentence."""


class _Retry(Exception):
    """This attempt failed in a way that the next one may not."""

    def __init__(self, message: str, *, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class Downloader:
    """How files are fetched. Thread-safe: `fetch` may run in many threads, each on its own file.

    `attempts` counts consecutive attempts that brought no new byte; a link that breaks every few
    megabytes is continued for as long as it brings something.
    """

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold a token
    attempts: int = 6
    backoff_s: float = 1.0  # before the second attempt; doubled before each further one
    timeout_s: float = 30.0  # to connect, and between two reads
    stop: threading.Event = field(default_factory=threading.Event)

    def fetch(
        self,
        url: str,
        path: Path,
        *,
        check: Callable[[Path], None] | None = None,
    ) -> None:
        """Fetch `url` to `path`; returns only when the file is complete and durable under its name.

        `check` sees the complete file before it takes its name and raises ValueError to refuse it.
        Raises DownloadError.
        """
        part = path.with_name(path.name + ".part")
        fruitless, problem = 0, ""
        while fruitless < self.attempts:
            if fruitless:
                wait_s = min(self.backoff_s * 2 ** (fruitless - 1), _LONGEST_WAIT_S)
                self.stop.wait(wait_s)
            before = _size(part)
            try:
                sha256 = self._attempt(url, part)
                _verify(part, sha256, check)
            except _Retry as retry:
                problem = str(retry)
                fruitless = 1 if _size(part) > before else fruitless + 1
                self.stop.wait(min(retry.wait_s, _LONGEST_WAIT_S))
            except requests.RequestException as error:  # cut, refused, timed out, not resolved
                problem = _in_short(error, url)
                fruitless = 1 if _size(part) > before else fruitless + 1
            except OSError as error:  # the disk, not the net (requests' errors are caught above)
                raise DownloadError(f"cannot write {part}: {error.strerror}") from error
            else:
                part.replace(path)
                fsync_dir(path.parent)
                return
            if self.stop.is_set():
                raise DownloadError("interrupted; the same command continues it")
        raise DownloadError(f"given up after {self.attempts} attempts without progress ({problem})")

    def _attempt(self, url: str, part: Path) -> str | None:
        """One request, from where `part` ends to the file's end; returns the SHA-256 if announced."""
        have = _size(part)
        headers = {**self.headers, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=self.timeout_s) as response:
            sha256 = _announced_sha256(response)
            status = response.status_code
            if status == 416:  # nothing after `have`: complete already, or longer than the file
                total = _int_or_none(response.headers.get("Content-Range", "").rpartition("/")[2])
                if total == have:
                    return sha256
                part.unlink(missing_ok=True)
                raise _Retry("the partial file was longer than the file")
            if status in _RETRIED_STATUS:
                wait = _int_or_none(response.headers.get("Retry-After"))
                raise _Retry(f"HTTP {status}", wait_s=float(wait or 0))
            if status == 404:
                raise DownloadError(f"not found (HTTP 404 for {url})")
            if status in (401, 403):
                raise DownloadError(f"not allowed (HTTP {status} for {url}): set HF_TOKEN")
            if status not in (200, 206):
                raise DownloadError(f"unexpected answer HTTP {status} for {url}")
            total = _total_bytes(response, have)
            with open(part, "ab" if status == 206 else "wb") as file:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    if self.stop.is_set():
                        raise _Retry("interrupted")
                file.flush()
                os.fsync(file.fileno())
        have = _size(part)
        if total is not None and have > total:
            part.unlink()
        if total is not None and have != total:
            raise _Retry(f"got {have} bytes of {total}")
        return sha256


def _in_short(error: requests.RequestException, url: str) -> str:
    """The network's error, without the four layers of libraries around it."""
    host = urlsplit(url).netloc
    if isinstance(error, requests.Timeout):
        return f"{host} did not answer in time"
    cause = error.args[0] if error.args else error
    # the system's own words stand last: "… [Errno 111] Connection refused"
    _, errno, words = str(getattr(cause, "reason", cause)).rpartition("] ")
    words = words.rstrip(")'\"") if errno else type(error).__name__
    return f"the connection to {host} failed: {words}"


def _verify(part: Path, sha256: str | None, check: Callable[[Path], None] | None) -> None:
    """Refuse (and remove) a complete file that is not the one announced."""
    try:
        if sha256 is not None and sha256_file(part) != sha256:
            raise ValueError("its SHA-256 is not the announced one")
        if check is not None:
            check(part)
    except ValueError as error:
        part.unlink(missing_ok=True)
        raise _Retry(str(error)) from error


def _total_bytes(response: requests.Response, have: int) -> int | None:
    """Size of the whole file; None if the server does not say."""
    if response.status_code == 200:
        return _int_or_none(response.headers.get("Content-Length"))
    content_range = response.headers.get("Content-Range", "")  # "bytes 500-999/1000"
    first = _int_or_none(content_range.removeprefix("bytes ").partition("-")[0])
    if first != have:
        raise _Retry(f"asked for bytes from {have} on, was sent {content_range!r}")
    return _int_or_none(content_range.rpartition("/")[2])


def _announced_sha256(response: requests.Response) -> str | None:
    """The hub names a large file's SHA-256 in the answer that redirects to the file's storage."""
    for answer in (*response.history, response):
        tag = answer.headers.get("X-Linked-Etag", "").strip('"').lower()
        if len(tag) == hashlib.sha256().digest_size * 2:
            return tag
    return None


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _int_or_none(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None
