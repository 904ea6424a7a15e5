"""The run configuration: typed, checked, frozen.

Flower passes on what was typed: it neither checks types (`lr="abc"` passes) nor names an unknown key, and a
mistake would show after an hour of training. So every key is declared once, here, with its default, its
limits and a sentence; `pyproject.toml` and the README's table are tested against it. Standard library only:
ClientApps and the command line import this without torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pilot.config_values import AUTO as AUTO  # these five are also found here
from pilot.config_values import AutoFloat as AutoFloat
from pilot.config_values import Scalar as Scalar
from pilot.config_values import check_alert_url as check_alert_url
from pilot.config_values import check_name as check_name
from pilot.config_values import check_value, dashed, unknown_key
from pilot.errors import ConfigError
from pilot.redis_url import check_redis_url, has_credentials


def _key(
    default: Scalar,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    shapes_training: bool = True,
    secret: bool = False,
) -> Any:
    """Declare a run-config key; `shapes_training`: another value gives another model; `secret`: it is kept from
    logs, orders, snapshots and W&B."""
    return field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "choices": tuple(choices),
            "shapes_training": shapes_training,
            "secret": secret,
        },
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every run-config key (dashes become underscores). Durations are seconds, batch sizes tokens."""

    # the run
    run_name: str = _key("", "name of the run; empty: one is generated", shapes_training=False)
    seed: int = _key(0, "random seed for the initial weights and the order of shards", low=0)
    # the model
    depth: int = _key(
        20, "number of transformer layers; width follows from it, 64 per layer", low=1, high=128
    )
    arch: str = _key("classic", "model architecture", choices=("classic", "modern"))
    vocab_size: int = _key(
        65536, "vocabulary size in tokens, checked against every site's tokenizer", low=266
    )
    sequence_len: int = _key(2048, "context length: tokens per row", low=8, high=1 << 20)
    window_pattern: str = _key(
        "", "attention windows of successive layers, such as SSSL; empty: the architecture's own"
    )
    # the data
    source: str = _key(
        "fineweb-edu", "fineweb-edu, climbmix, builtin, hf:NAME, or a directory of shards"
    )
    num_shards: int = _key(240, "number of the source's training shards to use", low=1)
    epochs: int = _key(1, "passes over the shards before the data is exhausted", low=1)
    tokenizer: str = _key(
        "tokenizer", "tokenizer directory: a name under each site's base directory, or a path there"
    )
    packing: str = _key(
        "bestfit", "how documents are packed into rows", choices=("bestfit", "stream")
    )
    eval_rows: int = _key(512, "validation rows on which each merged model is scored", low=1)
    # how long
    total_tokens: int = _key(0, "tokens to train on; 0: set by target-param-data-ratio", low=0)
    target_param_data_ratio: float = _key(
        20.0, "training tokens per parameter, used if total-tokens is 0", low=0.0
    )
    num_rounds: int = _key(0, "maximum number of rounds; 0: no limit", low=0)
    # the inner optimizer and its schedule
    lr: float = _key(
        0.02, "Muon's learning rate, for matrices; rates left at 0 scale with it", low=0
    )
    embedding_lr: float = _key(0.0, "learning rate of the embeddings; 0: scales with lr", low=0)
    unembedding_lr: float = _key(0.0, "learning rate of the output head; 0: scales with lr", low=0)
    scalar_lr: float = _key(
        0.0, "learning rate of the modern architecture's scalars; 0: scales with lr", low=0
    )
    weight_decay: float = _key(
        0.2, "Muon's weight decay at depth 12; other depths are scaled from it", low=0
    )
    inner_state: str = _key(
        "keep",
        "what a client does with its inner optimizer's state between rounds",
        choices=("keep", "reset"),
    )
    warmdown_ratio: float = _key(
        0.4, "final fraction of the run over which learning rates fall", low=0, high=1
    )
    total_batch_size: int = _key(524288, "tokens per optimizer step; of whom, batch-of says", low=1)
    batch_of: str = _key(
        "federation",
        "whose total-batch-size is: of each client, or of all clients of a round, who share it",
        choices=("client", "federation"),
    )
    device_batch_size: int = _key(
        0,
        "rows per device and forward pass; 0: what its memory has room for",
        low=0,
        shapes_training=False,
    )
    # rounds
    min_clients: int = _key(2, "clients to wait for before the first round", low=1)
    quorum: int = _key(
        2, "clients that must be training before round-min-duration may end a round", low=1
    )
    round_min_duration: float = _key(
        600.0,
        "seconds after which a round ends if quorum clients are training; unused with target-tokens",
        low=0,
    )
    round_max_duration: float = _key(3600.0, "hard limit on a round's length, in seconds", low=1)
    target_tokens: int = _key(
        0, "tokens of all clients together at which a round ends; 0: time decides", low=0
    )
    round_steps: int = _key(
        0, "optimizer steps per client and round; 0: time or tokens decide", low=0
    )
    grace_max: float = _key(
        600.0,
        "maximum number of seconds to wait for replies after a round has ended",
        low=1,
        shapes_training=False,
    )
    join_min_remaining: float = _key(
        0.0,
        "seconds that must remain for a client to join a running round; 0: twice a round's fixed cost",
        low=0,
        shapes_training=False,
    )
    drain_deadline: float = _key(
        20.0,
        "seconds a departing client has to send its reply",
        low=1,
        shapes_training=False,
    )
    preempt_file: str = _key(
        "", "file on a site; when it appears, the client leaves", shapes_training=False
    )
    clients_timeout: float = _key(
        1800.0, "seconds to wait for clients before the run fails", low=1, shapes_training=False
    )
    # the outer optimizer
    outer_optimizer: str = _key(
        "nesterov",
        "how the mean pseudo-gradient changes the global model",
        choices=("fedavg", "nesterov", "adam"),
    )
    outer_lr: float | Literal["auto"] = _key(
        AUTO,
        "learning rate of the outer step; auto: 1, of a mean as long as the clients' updates",
        low=0,
    )
    outer_momentum: float | Literal["auto"] = _key(
        AUTO, "momentum of nesterov, beta1 of adam; auto: 0, of adam 0.9", low=0, high=1
    )
    aggregation: str = _key(
        "mean",
        "how the clients' pseudo-gradients are combined",
        choices=("mean", "trimmed-mean", "median"),
    )
    trim_fraction: float = _key(
        0.2, "fraction of values that trimmed-mean cuts at each end", low=0, high=0.49
    )
    # admission
    max_update_norm_ratio: float = _key(
        4.0, "refuse updates longer than usual by this factor; 0: any", low=0, shapes_training=False
    )
    min_update_cosine: float = _key(
        -0.25, "least cosine with a round's others; -1: any", low=-1, high=0, shapes_training=False
    )
    take_back_ratio: float = _key(
        1.25, "take back merges that raise bpb this much; 0: none", low=0, shapes_training=False
    )
    quarantine: bool = _key(
        False, "keep refused updates on disk for inspection", shapes_training=False
    )
    cooling_time: float = _key(
        300.0,
        "seconds for which a client gets no work after three refusals in a row",
        low=0,
        shapes_training=False,
    )
    wire_up: str = _key(
        "float32",
        "form in which pseudo-gradients are sent",
        choices=("float32", "bfloat16", "int8", "int4", "sparse"),
    )
    wire_down: str = _key(
        "full",
        "what clients are sent of the global model: all of it, or its last step in few bits",
        choices=("full", "int8", "int4", "sparse"),
    )
    mirror_history: int = _key(
        8,
        "last steps that the server keeps for clients that missed some, unless wire-down is full",
        low=1,
        high=1000,
        shapes_training=False,
    )
    # sites
    device: str = _key(
        "auto",
        "device that sites train on",
        choices=("auto", "cpu", "cuda", "mps"),
        shapes_training=False,
    )
    compile: str = _key(
        "auto",
        "compile the training step; auto: only when the run is long enough to pay for it",
        choices=("auto", "on", "off"),
        shapes_training=False,
    )
    fp8: bool = _key(
        False,
        "train with matmuls in fp8; every site then needs GPUs that have it (Ada, Hopper or newer)",
    )
    client_processes: int = _key(
        0,
        "worker processes per client; 0: one per GPU, or one without GPUs",
        low=0,
        shapes_training=False,
    )
    worker_idle: float = _key(
        300.0,
        "seconds that idle workers wait for their client's next order; 0: new workers every round",
        low=0,
        high=1200,
        shapes_training=False,
    )
    client_threads: int = _key(
        0, "CPU threads per process; 0: a fair share of the cores", low=0, shapes_training=False
    )
    # services
    redis_url: str = _key(
        "", "Redis for the run, used where PILOT_REDIS_URL is unset", shapes_training=False
    )
    heartbeat: float = _key(1.0, "heartbeat interval in seconds", low=0.05, shapes_training=False)
    snapshot_keep: int = _key(
        3, "number of latest snapshots to keep on disk", low=1, shapes_training=False
    )
    snapshot_keep_every: int = _key(
        0, "also keep every n-th round's snapshot for good; 0: none", low=0, shapes_training=False
    )
    resume_anyway: bool = _key(
        False, "resume even though the configuration has changed", shapes_training=False
    )
    wandb_mode: str = _key(
        "auto",
        "Weights & Biases mode; auto: online with an API key, else offline",
        choices=("auto", "online", "offline", "disabled"),
        shapes_training=False,
    )
    wandb_project: str = _key("pilot", "Weights & Biases project", shapes_training=False)
    tensorboard: bool = _key(
        False,
        "write the run's metrics for TensorBoard, to tensorboard/ in its directory",
        shapes_training=False,
    )
    prometheus_port: int = _key(
        0,
        "port on the server at which Prometheus finds the metrics; 0: none",
        low=0,
        high=65535,
        shapes_training=False,
    )
    prometheus_host: str = _key(
        "127.0.0.1", "address of that port; 0.0.0.0: any", shapes_training=False
    )
    alert_url: str = _key(
        "",
        "webhook that alerts are posted to, used where PILOT_ALERT_URL is unset",
        shapes_training=False,
        secret=True,
    )

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> "RunConfig":
        """Check `values` (dashed keys; missing ones take their defaults) and freeze them.

        Raises ConfigError with one sentence that names the key and what it may be.
        """
        fields = {dashed(f.name): f for f in dataclasses.fields(RunConfig)}
        checked: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                raise ConfigError(unknown_key(key, list(fields)))
            checked[fields[key].name] = check_value(key, value, fields[key])
        config = RunConfig(**checked)
        config._check_together()
        return config

    def to_mapping(self) -> dict[str, Scalar]:
        """All keys but secrets, which are empty."""
        return {
            dashed(f.name): "" if f.metadata["secret"] else getattr(self, f.name)
            for f in dataclasses.fields(self)
        }

    def training_keys(self) -> dict[str, Scalar]:
        """The keys with which another value would train another model: resuming compares them."""
        return {
            dashed(f.name): getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["shapes_training"]
        }

    @property
    def batch_rows(self) -> int:
        """Rows of one optimizer step: of a client, or of all clients of a round, as `batch_of` says."""
        return self.total_batch_size // self.sequence_len

    def _check_together(self) -> None:
        if self.total_batch_size % self.sequence_len:
            raise ConfigError(
                f"total-batch-size {self.total_batch_size} is not a multiple of sequence-len "
                f"{self.sequence_len}: choose {self.sequence_len * max(1, self.batch_rows)}"
            )
        if self.round_min_duration > self.round_max_duration:
            raise ConfigError(
                f"round-min-duration {self.round_min_duration:g} must not be longer than "
                f"round-max-duration {self.round_max_duration:g}"
            )
        if not self.total_tokens and not self.target_param_data_ratio:
            raise ConfigError("set total-tokens or target-param-data-ratio: both are 0")
        if set(self.window_pattern) - set("SL"):
            raise ConfigError(
                f'window-pattern "{self.window_pattern}" may hold only the letters S and L'
            )
        self._check_fp8()
        if self.run_name:
            check_name(self.run_name, "run-name")
        if self.outer_optimizer == "adam" and self.outer_lr == AUTO:
            raise ConfigError('outer-lr "auto" is not known for adam: choose one, such as 0.001')
        if self.outer_optimizer == "adam" and self.outer_momentum == 1:
            raise ConfigError("outer-momentum 1 has no bias correction in adam: choose less than 1")
        if self.wire_up == "sparse" and self.aggregation != "mean":
            raise ConfigError(
                f'aggregation "{self.aggregation}" finds next to nothing in sparse updates, whose clients send '
                'other values: set aggregation="mean", or wire-up="int4"'
            )
        if self.alert_url:
            check_alert_url(self.alert_url, "alert-url")
        if self.redis_url:
            check_redis_url(self.redis_url, "redis-url")
            if has_credentials(self.redis_url):
                raise ConfigError(
                    "redis-url holds credentials, which would travel with the run configuration: "
                    "put the whole URL in the environment variable PILOT_REDIS_URL instead"
                )

    def _check_fp8(self) -> None:
        if not self.fp8:
            return
        if self.device in ("cpu", "mps"):
            raise ConfigError(f'fp8 needs NVIDIA GPUs, and device is "{self.device}": drop one')
        for key, size in (("vocab-size", self.vocab_size), ("sequence-len", self.sequence_len)):
            if size % 16:
                raise ConfigError(
                    f"fp8 needs a {key} that 16 divides, not {size}: {size - size % 16}?"
                )


DEFAULTS: Mapping[str, Scalar] = RunConfig().to_mapping()
