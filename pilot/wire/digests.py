"""How a global model is named on the wire: the hex SHA-256 of its tensors, or "" for none.

Standard library only, since `messages` is; `steps.digest_of` computes one.
"""

_CHARS = 64


def is_digest(text: str) -> bool:
    """Whether `text` could name a model."""
    return len(text) == _CHARS and set(text) <= set("0123456789abcdef")


def check_digests(value: str | list[str] | None, most: int) -> None:
    """Raise ValueError, which begins with a verb, unless `value` is a digest, "", or at most `most` of them."""
    digests = value if isinstance(value, list) else [value or ""]
    if len(digests) > most:
        raise ValueError(f"has {len(digests)} items, more than {most}")
    if not all(not digest or is_digest(digest) for digest in digests):
        raise ValueError("is no digest of a model")
