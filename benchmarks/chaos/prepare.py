"""`python -m benchmarks.chaos.prepare`: the built-in corpus and its tokenizer in the base directory.

A process of its own, since the base directory is that of the environment.
"""

from benchmarks.chaos.micro import TOKENIZER, VOCAB_SIZE
from nanochat.builtin import ensure_builtin_tokenizer

if __name__ == "__main__":
    ensure_builtin_tokenizer(TOKENIZER, VOCAB_SIZE)
