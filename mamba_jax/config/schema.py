"""Configuration: an ``ml_collections.ConfigDict`` at the edge, frozen dataclasses inside.

A config file is a Python file with ``get_config() -> ConfigDict``; it starts from
``default_config()`` or ``preset_config(size, training_preset)`` and changes fields. Every field can
be overridden on the command line as ``--config.group.field=value``. ``freeze`` turns the result
into a ``RunConfig``; whatever is wrong with it is a ``UserError`` that names the value.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mamba_jax.config import checks as checks

Value = bool | int | float | str  # a field of a flattened config

_TABLE_ROWS = 64  # a tile of tensor cores and of TPUs' matrix units divides by it


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The structure of a model. Both families share it; the hybrid's fields say so."""

    family: str = "mamba"  # "mamba" or "hybrid"
    d_model: int = 768
    n_layers: int = 12
    d_state: int = 16
    d_conv: int = 4
    expand_factor: int = 2
    dt_rank: int = 0  # 0: ceil(d_model / 16)
    vocab_size: int = 0  # 0: as many as the tokenizer has
    max_seq_len: int = 2048  # tokens in a training window; generation has no limit
    dropout: float = 0.0
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    dtype: str = "auto"  # of matmuls: "bfloat16", "float32"; "auto": float32 on CPU, else bfloat16
    remat: str = "auto"  # "none", "dots", "full"; "auto": dots on CPU, else full
    scan: str = "auto"  # an implementation of ops.selective_scan
    # Hybrid Recursive Mamba only. Each part can be switched off for an ablation.
    recursion_depth: int = 3  # steps of the shared processor; 0: no recursion
    recursion_expand: int = 2  # its hidden width, in units of d_model
    recursion_reads_attention: bool = True  # False: attention once, after the recursion
    gate_skip_threshold: float = 0.0  # generating: skip a step no gate exceeds this at; 0: never
    gate_bias: float = 0.0  # of the depth gate at the start; 0: each step half open
    attention_scales: tuple[int, ...] = (1, 2, 4)  # pooling factors; (): no attention
    attention_window: int = 256  # pooled positions that a query sees at each scale
    attention_head_size: int = 0  # 0: 64 where it divides d_model, else 32, 16 …
    fusion: str = "residual_norm"  # or "norm" (no residual around it), "sum" (no projection)
    fusion_gain: float = 0.3  # of the fusion's norm at the start

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables: matrix units work on whole tiles. The rest are zeros for ever:
        no id chooses them, and no logit is theirs."""
        return -(-self.vocab_size // _TABLE_ROWS) * _TABLE_ROWS

    @property
    def d_inner(self) -> int:
        return self.expand_factor * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def head_size(self) -> int:
        if self.attention_head_size:
            return self.attention_head_size
        return next(size for size in (64, 32, 16, 8, 4, 2) if self.d_model % size == 0)

    @property
    def n_heads(self) -> int:
        return self.d_model // self.head_size


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, schedule and what happens when."""

    learning_rate: float = 3e-4  # the peak
    min_learning_rate_ratio: float = 0.1  # where the cosine ends, as a share of the peak
    warmup_steps: int = 2_000  # in a run too short for them: a tenth of max_steps
    max_steps: int = 100_000
    gradient_clip: float = 1.0  # largest global norm of the gradient
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    loss_chunk_tokens: int = 0  # logits are made for so many tokens at a time; 0: by device
    skip_spikes: float = 0.0  # skip a step whose gradient norm exceeds this × its mean; 0: never
    max_gradient_norm: float = 1e4  # above it the run stops as diverged
    log_steps: int = 10
    save_steps: int = 5_000
    eval_steps: int = 5_000
    eval_windows: int = 256  # held-out windows per evaluation, the same each time; 0: all
    keep_last: int = 3  # newest checkpoints to keep; the best by eval loss is kept as well
    keep_every: int = 0  # keep each checkpoint at a multiple of this step; 0: none

    @property
    def resolved_warmup_steps(self) -> int:
        """The warm-up, shortened where it would outlast the run (``max_steps=200`` as a trial)."""
        return self.warmup_steps if self.warmup_steps < self.max_steps else self.max_steps // 10


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: files, a dataset or tasks, or files beside one of these.

    Fields as in ``DataConfig``.
    """

    data_dir: str = ""
    dataset: str = ""
    dataset_config: str = ""
    dataset_split: str = "train"
    dataset_streaming: bool = False
    text_column: str = ""
    tasks: str = ""
    task_examples: int = 10_000
    weight: float = 1.0  # its share of the windows is this by the sum of all


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """From a step on, other weights."""

    step: int = 0
    weights: tuple[float, ...] = ()  # one for each source of the mixture


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens."""

    # "": the dataset; without one ./data where it exists, else the Python standard library's source
    data_dir: str = ""
    dataset: str = ""  # an id on the Hugging Face Hub, or a folder; beside data_dir: both are read
    dataset_config: str = ""  # one of the dataset's configurations, where it has several
    dataset_split: str = "train"  # or another, or a part of one: "train[:10%]"
    dataset_streaming: bool = False  # tokenise rows as they arrive, and keep no download
    text_column: str = ""  # "a,b": joined by a blank line; "": text, else as the columns suggest
    tasks: str = ""  # problems to learn from, as "arithmetic:1-3,recall:4": task and difficulties
    task_examples: int = 10_000  # of each task and difficulty
    # Several sources in place of one, each with a share of every stretch of the training.
    mixture: tuple[SourceConfig, ...] = ()
    curriculum: tuple[PhaseConfig, ...] = ()  # by step; (): the weights of the mixture throughout
    # "packed": documents one after another, the state reset at each; "concat": not reset;
    # "document": each begins a window of its own, filled up with targets that are not learnt
    window: str = "packed"
    loss_on: str = "all"  # "answer": of rows with prompts, chats included, learn the answers alone
    # "gpt2", "bytes", an encoding of tiktoken, a tokenizer.json or its folder, an id of the Hub
    tokenizer: str = "gpt2"
    # Share of documents learnt as prefix, suffix, then the middle between them, as for code
    fim_rate: float = 0.0
    deduplicate: str = (
        "exact"  # leave out equal documents; "near": and similar ones; "none": keep all
    )
    tokenise_workers: int = 0  # processes; 0: as many as there are processors and the text is worth
    eval_fraction: float = 0.01  # of the tokens, held out by content hash
    cache_dir: str = ""  # tokenised shards; "": $XDG_CACHE_HOME/mamba_jax

    @property
    def sources(self) -> tuple["DataConfig", ...]:
        """The settings of each source, alone."""
        plain = dataclasses.replace(self, mixture=(), curriculum=())
        fields = lambda source: {
            name: value for name, value in vars(source).items() if name != "weight"
        }
        made = (dataclasses.replace(plain, **fields(source)) for source in self.mixture)
        return tuple(made) or (plain,)

    @property
    def has_unlearnt(self) -> bool:
        """Whether a window may hold tokens that are no targets, written as ``~token``."""
        return self.window == "document" or self.loss_on == "answer"

    @property
    def cache_root(self) -> pathlib.Path:
        """The folder of all that is kept between runs."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return pathlib.Path(self.cache_dir or f"{home}/mamba_jax").expanduser()


@dataclasses.dataclass(frozen=True)
class VramConfig:
    """How the effective batch is laid out on the device."""

    effective_batch_size: int = 32  # sequences per optimizer step
    batch_size: int = 0  # sequences per microbatch, over all devices; 0: the most that fit
    gradient_accumulation_steps: int = 0  # 0: effective_batch_size / batch_size
    memory_gb: float = 16.0  # GiB of each device, where it is not detected
    auto: bool = False  # use all the memory that the device is found to have
    safety_margin_mb: int = 2048  # MiB of it that a run leaves free

    @property
    def accumulation_steps(self) -> int:
        """Microbatches per step; ``batch_size`` must be set or planned."""
        return self.gradient_accumulation_steps or self.effective_batch_size // self.batch_size

    def microbatches(self, devices: int) -> list[int]:
        """Returns the microbatches that make up the effective batch exactly, smallest first.

        Each device gets equally many sequences of one.
        """
        whole = self.effective_batch_size
        return [size for size in range(devices, whole + 1, devices) if whole % size == 0]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh; the data axis takes every device that fsdp leaves."""

    fsdp: int = 1  # devices that share one copy of parameters and optimizer state


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on: a run is a pure function of it and of the data."""

    name: str = "mamba"
    seed: int = 42
    output_dir: str = "checkpoints"
    log_dir: str = "logs"
    tensorboard_dir: str = "runs"
    sample_prompt: str = ""  # when not empty, a sample from it follows each evaluation
    trackers: str = ""  # "wandb", "mlflow" or "wandb,mlflow"; each needs the extra of its name
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    vram: VramConfig = VramConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def tracker_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.trackers.split(",") if name.strip())


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the config as plain JSON types; ``from_dict`` is the inverse."""
    return dataclasses.asdict(config)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Returns the fields of ``config.to_dict`` by dotted name; what is no plain value, as text."""
    flat: dict[str, Value] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            flat[prefix + name] = value if plain else str(value)
    return flat
