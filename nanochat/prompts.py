"""A few prompts and what a base model makes of them: a look at it, not a figure."""

from nanochat.engine import Engine

PROMPTS = (
    "The capital of France is",
    "If a function returns None, then",
    "Water boils at",
    "The opposite of hot is",
)
_SAMPLE_TOKENS = 24


def sample_texts(engine: Engine) -> list[str]:
    """Each prompt with its likeliest continuation, up to the next document."""
    tokenizer = engine.tokenizer
    return [
        prompt
        + "".join(
            engine.stream(
                tokenizer.encode(prompt, prepend=engine.bos), _SAMPLE_TOKENS, temperature=0.0
            )
        )
        for prompt in PROMPTS
    ]
