"""Exact byte-pair encoding in Rust; README.md says how it works."""

from collections.abc import Iterable, Sequence
from typing import final

__all__ = ["DEFAULT_PATTERN", "Tokenizer"]

DEFAULT_PATTERN: str

@final
class Tokenizer:
    def __new__(cls) -> Tokenizer: ...
    @staticmethod
    def from_ranks(tokens: Sequence[bytes], pattern: str | None = None) -> Tokenizer: ...
    @property
    def training_stats(self) -> dict[str, float]:
        """`counting_s`, `merging_s`, `distinct_words` of the last training; empty before."""
    @property
    def vocab_size(self) -> int: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        num_threads: int | None = None,
    ) -> None: ...
    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
    def encode(self, text: str) -> list[int]: ...
    def batch_encode(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> list[list[int]]: ...
    def batch_encode_bytes(
        self, texts: Sequence[str], *, id_bytes: int, num_threads: int | None = None
    ) -> list[bytes]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
