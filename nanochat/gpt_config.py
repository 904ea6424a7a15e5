"""The shape of a model, and the one dial from which it follows."""

from dataclasses import asdict, dataclass
from typing import Any

from nanochat.errors import UserError

ARCHITECTURES = ("classic", "modern")

SMEAR_CHANNELS = 24  # the first channels of a token decide how much of its predecessor it takes
VE_GATE_CHANNELS = 12  # and how much of its value embedding

_VOCAB_MULTIPLE = 64  # rows of the vocabulary matrices are padded to it: matmuls like even shapes


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; `window_pattern` None (or "") becomes the architecture's default."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str | None = None
    arch: str = "classic"

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise UserError(f"arch is {self.arch!r}: choose one of {', '.join(ARCHITECTURES)}")
        if not self.window_pattern:
            object.__setattr__(self, "window_pattern", "SSSL" if self.is_modern else "L")
        object.__setattr__(self, "window_pattern", str(self.window_pattern).upper())
        if set(self.pattern) - set("SL"):
            raise UserError(f"window_pattern is {self.window_pattern!r}: use the letters S and L")
        sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"n_embd {self.n_embd} must be a multiple of 2 * n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )
        if self.is_modern and self.n_embd < SMEAR_CHANNELS:
            raise UserError(f"the modern architecture needs n_embd of at least {SMEAR_CHANNELS}")

    @property
    def is_modern(self) -> bool:
        return self.arch == "modern"

    @property
    def pattern(self) -> str:
        """`window_pattern`, which is never None once the config is made."""
        assert self.window_pattern is not None
        return self.window_pattern

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer of a modern model has one, the last one always."""
        return self.is_modern and layer % 2 == (self.n_layer - 1) % 2

    def to_meta(self) -> dict[str, Any]:
        """What a checkpoint holds: upstream's seven keys, and `arch` only if it is classic."""
        values = asdict(self)
        if self.is_modern:
            del values["arch"]
        return values


def config_for_depth(
    depth: int,
    *,
    vocab_size: int,
    sequence_len: int,
    arch: str = "classic",
    head_dim: int = 128,
    aspect_ratio: int = 64,
    window_pattern: str | None = None,
) -> GPTConfig:
    """The depth dial: width is depth * 64 rounded up to whole heads; all else follows from it."""
    if depth < 1:
        raise UserError(f"depth is {depth}: it must be at least 1")
    n_head = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=n_head,
        n_embd=n_head * head_dim,
        window_pattern=window_pattern,
        arch=arch,
    )
