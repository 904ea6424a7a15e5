"""What any text needs before tiktoken or rustbpe can take it."""

import re
from collections.abc import Iterator

# tiktoken's regex engine panics on a run of some 500,000 spaces (measured, 0.14): one such document
# must not cost the whole shard, so longer runs than this are encoded in pieces.
LONGEST_SPACE = 100_000
# Tried once per run, at its beginning: tried everywhere, it would cost a run's length at each of its spaces.
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_SPACE},}}")


def valid_text(text: str) -> str:
    """`text` as tiktoken encodes it: halves of surrogate pairs, which have no UTF-8, become U+FFFD."""
    if not isinstance(text, str) or text.isascii():  # what is no str is refused where it is used
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def has_long_space(text: str) -> bool:
    """Whether a run of white space in `text` is longer than tiktoken's engine can take."""
    return len(text) > LONGEST_SPACE and _LONG_SPACE.search(text) is not None


def space_pieces(text: str) -> Iterator[str]:
    """`text` in pieces that tiktoken's engine can take: long runs of white space are cut."""
    begin = 0
    for run in _LONG_SPACE.finditer(text):
        for end in range(run.start(), run.end() + 1, LONGEST_SPACE):
            yield text[begin:end]
            begin = end
    yield text[begin:]
