"""Rows as they must be, packed in one go."""

from collections.abc import Sequence

import numpy as np

from nanochat.rows.packing import make_packer
from nanochat.tokenizer import RustBPETokenizer

T = 31


def reference(
    tokenizer: RustBPETokenizer,
    documents: Sequence[str | None],
    packing: str,
    sequence_len: int = T,
) -> np.ndarray:
    """Rows of `documents`, packed here in one go."""
    dtype = np.dtype("<u2" if tokenizer.get_vocab_size() <= 65_536 else "<u4")
    bos = tokenizer.get_bos_token_id()
    packer = make_packer(packing, sequence_len=sequence_len, bos=bos, dtype=dtype)
    ids = [np.array(tokenizer.encode(text or ""), dtype=dtype) for text in documents]
    rows = list(packer.rows(enumerate(ids)))
    return np.array(rows, dtype=dtype).reshape(len(rows), sequence_len + 1)
