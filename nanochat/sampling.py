"""The next token out of a model's logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import UserError

_COLD = 1e-6
_SEEDS = range(-(2**63), 2**64)  # torch's


def seeded_generator(seed: int, device: torch.device | str) -> torch.Generator:
    """A generator whose numbers are a function of `seed`; UserError beyond torch's range of seeds."""
    check_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def check_seed(seed: int) -> None:
    """Raise UserError unless torch takes `seed`."""
    if seed not in _SEEDS:
        raise UserError(f"the seed {seed} is out of range: choose one from 0 to 2^64 - 1")


def sample_next_token(
    logits: Tensor,
    rng: torch.Generator | None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """One token for each row of logits (B, vocab_size); returns (B, 1).

    temperature 0 takes the likeliest token and draws nothing; top_k leaves the k likeliest only.
    Raises ValueError for a temperature that is negative or not finite and for a top_k below 1.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, it is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, it is {top_k}")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    candidates = None
    if top_k is not None and top_k < logits.size(-1):
        logits, candidates = torch.topk(logits, top_k, dim=-1)
    if temperature < _COLD:  # a quotient would overflow; those of differences may
        logits = logits - logits.amax(dim=-1, keepdim=True)
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    probabilities = F.softmax(logits / temperature, dim=-1)
    drawn = torch.multinomial(probabilities, 1, generator=rng)
    return drawn if candidates is None else candidates.gather(-1, drawn)
