"""Generation with a KV cache: one prompt, computed once, continued in one way or in many.

The prompt fills a cache of one row, which is then spread over the samples; after that each token of
all samples costs one forward of one position. `GPT.generate` recomputes everything and is the
reference that this is tested against.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence

import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import sample_next_token, seeded_generator
from nanochat.tokenizer import RustBPETokenizer

__all__ = ["Engine", "KVCache", "sample_next_token", "stream_text"]


class Engine:
    """Continues token sequences with `model`; `tokenizer` says which tokens end one."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.bos = tokenizer.get_bos_token_id()
        # a document ends where the next one begins; a chat model's turn at its own mark
        self.stop_tokens = {self.bos, tokenizer.encode_special("<|assistant_end|>")}

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield a column at a time: the next token of each sample, and 1 where it was sampled.

        A sample that has drawn a stop token is finished: it yields BOS with a 0 while others continue.
        Ends with the last sample, or after `max_tokens` (None: at the model's sequence length). A seed
        makes the tokens a function of it. Raises UserError where the sequence would outgrow the
        model's positions.
        """
        model, device = self.model, self.model.get_device()
        if not tokens:
            raise UserError("there is no prompt: begin with BOS")
        if max_tokens is None:
            max_tokens = max(0, model.config.sequence_len - len(tokens))
        longest = model.max_positions
        if len(tokens) + max_tokens > longest:
            raise UserError(
                f"a prompt of {len(tokens)} tokens and {max_tokens} more are too many: this model "
                f"has {longest} positions"
            )
        if max_tokens == 0 or num_samples == 0:
            return
        rng = seeded_generator(seed, device)
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=device)
        prompt = self._cache(1, len(tokens))
        logits = model(ids, kv_cache=prompt)[:, -1]  # (1, vocab_size)
        logits = logits.expand(num_samples, -1)
        cache = self._cache(num_samples, len(tokens) + max_tokens)
        cache.prefill(prompt)
        del prompt
        ended = [False] * num_samples
        for left in reversed(range(max_tokens)):
            next_ids = sample_next_token(logits, rng, temperature, top_k)  # (num_samples, 1)
            drawn = next_ids[:, 0].tolist()
            column = [self.bos if over else t for t, over in zip(drawn, ended, strict=True)]
            sampled = [0 if over else 1 for over in ended]
            ended = [over or t in self.stop_tokens for t, over in zip(drawn, ended, strict=True)]
            yield column, sampled
            if all(ended) or not left:
                return
            logits = model(next_ids, kv_cache=cache)[:, -1]

    def generate_batch(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(sequences, masks): prompt and continuation of each sample, without its stop token.

        A mask is 1 where a token was sampled and 0 on the prompt.
        """
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        columns = self.generate(tokens, num_samples, max_tokens, temperature, top_k, seed)
        for column, sampled in columns:
            for row, (token, was_sampled) in enumerate(zip(column, sampled, strict=True)):
                if was_sampled and token not in self.stop_tokens:
                    results[row].append(token)
                    masks[row].append(1)
        return results, masks

    def stream(
        self,
        tokens: Sequence[int],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[str]:
        """Yield the text that one sample adds, as it comes; ends before its stop token."""
        columns = self.generate(tokens, 1, max_tokens, temperature, top_k, seed)
        drawn = (column[0] for column, _ in columns)
        return stream_text(self.tokenizer, (t for t in drawn if t not in self.stop_tokens))

    def _cache(self, rows: int, length: int) -> KVCache:
        config = self.model.config
        try:
            return KVCache(
                batch_size=rows,
                num_heads=config.n_kv_head,
                seq_len=length,
                head_dim=config.head_dim,
                num_layers=config.n_layer,
                device=self.model.get_device(),
                dtype=self.model.compute_dtype,
            )
        except (RuntimeError, MemoryError) as error:  # torch has no class for the CPU's
            raise UserError(
                f"{rows} samples of {length} tokens do not fit this device's memory: ask for fewer"
            ) from error


def stream_text(tokenizer: RustBPETokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text of `tokens` piece by piece: a character whose bytes are several tokens comes whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(tokenizer.enc.decode_single_token_bytes(token)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
