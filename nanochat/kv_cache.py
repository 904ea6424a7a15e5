"""Keys and values of the tokens that a model has seen, so that each further token costs one position.

A full forward of T tokens to get one more costs O(T^2) a token; with the cache it is O(T).
"""

import torch
from torch import Tensor


class KVCache:
    """Room for `seq_len` positions of `batch_size` sequences, in all layers; filled from the left.

    All rows are at the same position. `GPT.forward` writes a layer's keys and values through
    `get_layer_cache` and calls `advance` once, after its last layer. `num_heads` counts key and
    value heads.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.batch_size, self.max_seq_len = batch_size, seq_len
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        # (B, 1, C), the last token's normed embedding, which a modern model smears into the next
        self.prev_embedding: Tensor | None = None
        self._pos = 0  # what cache_seqlens holds, known without asking the device

    def reset(self) -> None:
        """Forget all tokens; what the tensors hold is overwritten as new ones come."""
        self.cache_seqlens.zero_()
        self.prev_embedding = None
        self._pos = 0

    def get_pos(self) -> int:
        """How many tokens of each row it holds."""
        return self._pos

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys and values, (B, seq_len, num_heads, head_dim) each."""
        return self.k_cache[layer], self.v_cache[layer]

    def check_room(self, rows: int, num_tokens: int) -> None:
        """Raise ValueError unless `num_tokens` more tokens of `rows` rows fit."""
        if rows != self.batch_size:
            raise ValueError(f"the cache is made for {self.batch_size} rows, not {rows}")
        if self._pos + num_tokens > self.max_seq_len:
            raise ValueError(
                f"{self._pos} + {num_tokens} tokens do not fit a cache of {self.max_seq_len}"
            )

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more of every row as held."""
        self.cache_seqlens += num_tokens
        self._pos += num_tokens

    def prefill(self, other: "KVCache") -> None:
        """Take over what `other` holds; its one row (or as many as here) becomes every row here.

        A prompt is computed once, then continued in many ways. Raises ValueError if this cache is
        not empty, or of another shape, or too small.
        """
        if self._pos:
            raise ValueError("prefill needs an empty cache: reset it first")
        layers, rows, _, heads, dim = other.k_cache.shape
        own_layers, own_rows, own_len, own_heads, own_dim = self.k_cache.shape
        if (layers, heads, dim) != (own_layers, own_heads, own_dim) or rows not in (1, own_rows):
            raise ValueError("prefill needs a cache of the same model, of one row or of as many")
        length = other.get_pos()
        if length > own_len:
            raise ValueError(f"{length} tokens do not fit a cache of {own_len}")
        self.k_cache[:, :, :length] = other.k_cache[:, :, :length]
        self.v_cache[:, :, :length] = other.v_cache[:, :, :length]
        if other.prev_embedding is not None:
            shape = (own_rows, -1, -1)
            self.prev_embedding = other.prev_embedding.expand(shape).clone()
        self.advance(length)
