"""What may stand in a Redis URL, and the same URL without its secrets. Standard library only."""

import re
from urllib.parse import unquote, urlsplit

from pilot.errors import ConfigError

# A secret in a query, as redis-py spells it: username, password, ssl_password.
_SECRET = re.compile(r"(?i)([?&][^=&@]*(?:password|username)=)[^&#]*")


def check_redis_url(url: str, name: str) -> None:
    """Raise ConfigError, without showing credentials, unless `url` is one that redis-py takes."""
    shown = redact_url(url)
    if url.partition("://")[0] not in ("redis", "rediss", "unix"):
        raise ConfigError(f'{name} "{shown}" must start with redis://, rediss:// or unix://')
    try:
        parts = urlsplit(url)
        port = parts.port if parts.scheme != "unix" else None
    except ValueError:  # its text may show a part of the password: no `from`
        raise ConfigError(f'{name} "{shown}" is not a URL: check host and port') from None
    strange = _SECRET.sub("", f"{parts.path}?{parts.query}") if parts.scheme != "unix" else ""
    if parts.fragment or port == 0 or "@" in strange:
        raise ConfigError(
            f'{name} "{shown}" is not a URL that Redis takes: write special characters of a '
            "password as %XX"
        )


def redact_url(url: str) -> str:
    """`url`, which may be malformed, without anything that could be a user name or a password."""
    start, end = _credentials_span(url)
    shown = f"{url[:start]}***@{url[end:]}" if end > start else url
    return _SECRET.sub(r"\1***", shown)


def without_credentials(url: str) -> str:
    """`url` as it may travel in a message: no user, no password."""
    start, end = _credentials_span(url)
    address, mark, query = (url[:start] + url[end:]).partition("?")
    pairs = [pair for pair in query.split("&") if not _SECRET.search(f"?{unquote(pair)}")]
    return address + mark + "&".join(pairs) if pairs else address


def has_credentials(url: str) -> bool:
    start, end = _credentials_span(url)
    return end > start or bool(_SECRET.search(unquote(url)))


def _credentials_span(url: str) -> tuple[int, int]:
    """Where `user:password@` stands in `url`; an empty span if nowhere.

    It ends at the last "@" of the authority, or later, before the secrets of a query: an unescaped
    "/" in a password makes the authority look shorter. The path of a Unix socket may hold an "@".
    """
    start = url.find("://") + 3 if "://" in url else 0
    rest = url[start:]
    end = re.split(r"[/?#]", rest, maxsplit=1)[0].rfind("@")
    if not url.startswith("unix://"):
        end = max(end, _SECRET.split(rest, maxsplit=1)[0].rfind("@"))
    return start, start + end + 1
