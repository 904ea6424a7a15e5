"""The next token out of a model's logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_next_token(
    logits: Tensor,
    rng: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """One token for each row of logits (B, vocab_size); returns (B, 1).

    temperature 0 takes the likeliest token and draws nothing; top_k leaves the k likeliest only.
    Raises ValueError for a negative temperature and for a top_k below 1.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, it is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, it is {top_k}")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    candidates = None
    if top_k is not None and top_k < logits.size(-1):
        logits, candidates = torch.topk(logits, top_k, dim=-1)
    probabilities = F.softmax(logits / temperature, dim=-1)
    drawn = torch.multinomial(probabilities, 1, generator=rng)
    return drawn if candidates is None else candidates.gather(-1, drawn)
