"""The fields of a run's config: frozen dataclasses, each field with its type, limits and help.

``config/fields.py`` reads the annotations; checks, ``docs/reference/config.md`` and ``--help`` come
from them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from mamba_jax.config.fields import FRACTION, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, SHARE
from mamba_jax.config.model import ModelConfig

Value = bool | int | float | str  # a field of a flattened config


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Optimizer, schedule, and the steps at which to log, evaluate and save."""

    learning_rate: Annotated[float, POSITIVE, "Peak of the schedule."] = 3e-4
    min_learning_rate_ratio: Annotated[
        float,
        SHARE,
        "Where the cosine ends, as a share of the peak.",
    ] = 0.1
    warmup_steps: Annotated[
        int,
        NOT_NEGATIVE,
        "Steps of linear warm-up; a tenth of max_steps if they would fill the whole run.",
    ] = 2_000
    max_steps: Annotated[int, POSITIVE, "Optimizer steps of the run."] = 100_000
    gradient_clip: Annotated[float, POSITIVE, "Largest global norm of the gradient."] = 1.0
    beta1: Annotated[float, FRACTION, "AdamW: decay of the first moment."] = 0.9
    beta2: Annotated[float, FRACTION, "AdamW: decay of the second moment."] = 0.95
    adam_eps: Annotated[float, POSITIVE, "AdamW: added to the root of the second moment."] = 1e-8
    weight_decay: Annotated[
        float,
        NOT_NEGATIVE,
        "AdamW: decay of matrices, not of norms, biases, A_log and D.",
    ] = 0.1
    loss_chunk_tokens: Annotated[
        int,
        NOT_NEGATIVE,
        "Tokens whose logits are computed at a time; 0: chosen by device.",
    ] = 0
    skip_spikes: Annotated[
        float,
        NOT_NEGATIVE,
        "Skip a step whose gradient norm exceeds this multiple of its running mean; 0: never.",
    ] = 0.0
    max_gradient_norm: Annotated[
        float,
        POSITIVE,
        "Stop the run as diverged above this gradient norm.",
    ] = 1e4
    log_steps: Annotated[int, POSITIVE, "Steps between log lines."] = 10
    save_steps: Annotated[int, POSITIVE, "Steps between checkpoints."] = 5_000
    eval_steps: Annotated[int, POSITIVE, "Steps between evaluations."] = 5_000
    eval_windows: Annotated[
        int,
        NOT_NEGATIVE,
        "Held-out windows per evaluation, the same each time; 0: all.",
    ] = 256
    keep_last: Annotated[
        int,
        POSITIVE,
        "Newest checkpoints to keep; the best by evaluation loss is kept too.",
    ] = 3
    keep_every: Annotated[
        int,
        NOT_NEGATIVE,
        "Also keep each checkpoint at a multiple of this step; 0: none.",
    ] = 0

    @property
    def resolved_warmup_steps(self) -> int:
        """The warm-up, shortened if it would outlast the run (a trial with ``max_steps=200``)."""
        return self.warmup_steps if self.warmup_steps < self.max_steps else self.max_steps // 10


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: files, a dataset or tasks, or files beside one of these.

    Fields as in ``DataConfig``.
    """

    data_dir: Annotated[str, "Folder or file of text."] = ""
    dataset: Annotated[str, "Hugging Face Hub id, or a folder."] = ""
    dataset_config: Annotated[str, "One of the dataset's configurations."] = ""
    dataset_split: Annotated[str, "A split or a slice of one."] = "train"
    dataset_streaming: Annotated[bool, "Tokenise rows as they arrive."] = False
    text_column: Annotated[str, "Columns of the text."] = ""
    tasks: Annotated[str, "Problems with exact answers."] = ""
    task_examples: Annotated[int, "Problems of each task and difficulty."] = 10_000
    weight: Annotated[float, "Share of the windows: this divided by the sum over sources."] = 1.0


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """New weights of the mixture from a given step on."""

    step: Annotated[int, "The step at which the phase starts."] = 0
    weights: Annotated[tuple[float, ...], "One weight for each source of the mixture."] = ()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes windows of tokens."""

    data_dir: Annotated[
        str,
        "Folder or file of text (.txt .md .py .json .jsonl, also as .gz or .zst; .parquet); "
        "default: ./data if it exists and no dataset is given, otherwise the source of "
        "Python's standard library.",
    ] = ""
    dataset: Annotated[
        str,
        "Hugging Face Hub id, or a folder with the layout of a dataset; with data_dir, "
        "both are read.",
    ] = ""
    dataset_config: Annotated[str, "One of the dataset's configurations, if it has several."] = ""
    dataset_split: Annotated[str, "A split of the dataset, or a slice: 'train[:10%]'."] = "train"
    dataset_streaming: Annotated[
        bool,
        "Tokenise rows as they arrive and store no download, for a dataset larger than the disk.",
    ] = False
    text_column: Annotated[
        str,
        "Columns of a row's text, joined by a blank line: A,B; default: chosen by the form "
        "of the rows (the log names them).",
    ] = ""
    tasks: Annotated[
        str,
        'Problems with exact answers, with difficulties N or M-N: "arithmetic:1-3,recall:4"; '
        "also list_operations, multi_hop, state_tracking.",
    ] = ""
    task_examples: Annotated[int, "Problems of each task and difficulty."] = 10_000
    mixture: Annotated[
        tuple[SourceConfig, ...],
        "Several sources instead of one, each with a weight.",
    ] = ()
    curriculum: Annotated[
        tuple[PhaseConfig, ...],
        "Weights of the mixture by step; (): the same throughout.",
    ] = ()
    window: Annotated[
        Literal["packed", "concat", "document"],
        "packed: documents one after another, the state reset at each; concat: not reset; "
        "document: each starts a window, the rest of which is not trained on.",
    ] = "packed"
    loss_on: Annotated[
        Literal["all", "answer"],
        "answer: in rows with prompts, chats included, train only on the answers.",
    ] = "all"
    tokenizer: Annotated[
        str,
        "gpt2, bytes, an encoding of tiktoken such as cl100k_base, a tokenizer.json or a "
        "folder with one, or a Hugging Face Hub id.",
    ] = "gpt2"
    fim_rate: Annotated[
        float,
        SHARE,
        "Share of documents that are reordered as prefix, suffix, middle for training.",
    ] = 0.0
    deduplicate: Annotated[
        Literal["exact", "near", "none"],
        "exact: drop identical documents; near: similar ones too; none: keep all.",
    ] = "exact"
    tokenise_workers: Annotated[
        int,
        NOT_NEGATIVE,
        "Processes that tokenise; 0: one per processor if there is enough text.",
    ] = 0
    eval_fraction: Annotated[
        float,
        FRACTION,
        "Share of the tokens to hold out, chosen by content hash.",
    ] = 0.01
    cache_dir: Annotated[
        str,
        "Folder of tokenised shards; default: $XDG_CACHE_HOME/mamba_jax.",
    ] = ""

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
    def has_loss_mask(self) -> bool:
        """Whether a window may contain tokens that are not targets, written as ``~token``."""
        return self.window == "document" or self.loss_on == "answer"

    @property
    def cache_root(self) -> pathlib.Path:
        """The folder of everything that is kept between runs."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return pathlib.Path(self.cache_dir or f"{home}/mamba_jax").expanduser()


@dataclasses.dataclass(frozen=True)
class VramConfig:
    """How the effective batch is laid out on the device."""

    effective_batch_size: Annotated[int, POSITIVE, "Sequences per optimizer step."] = 32
    batch_size: Annotated[
        int,
        NOT_NEGATIVE,
        "Sequences per microbatch, over all devices; 0: chosen to fit the memory.",
    ] = 0
    gradient_accumulation_steps: Annotated[
        int,
        NOT_NEGATIVE,
        "Microbatches per step; 0: effective_batch_size / batch_size.",
    ] = 0
    memory_gb: Annotated[
        float, POSITIVE, "GiB of memory of each device, where it is not detected."
    ] = 16.0
    auto: Annotated[bool, "Fit the microbatch to the whole memory of the device."] = False
    safety_margin_mb: Annotated[
        int,
        NOT_NEGATIVE,
        "MiB of the device's memory to leave free.",
    ] = 2048

    @property
    def accumulation_steps(self) -> int:
        """Microbatches per step; ``batch_size`` must be set or planned."""
        return self.gradient_accumulation_steps or self.effective_batch_size // self.batch_size

    def microbatches(self, devices: int) -> list[int]:
        """Returns the microbatches that make up the effective batch exactly, smallest first.

        Each device gets the same number of sequences.
        """
        whole = self.effective_batch_size
        return [size for size in range(devices, whole + 1, devices) if whole % size == 0]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh; the data axis takes every device that fsdp leaves."""

    fsdp: Annotated[
        int,
        POSITIVE,
        "Devices that share one copy of parameters and optimizer state; the data axis takes "
        "the others.",
    ] = 1


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on besides its data."""

    name: Annotated[str, NOT_EMPTY, "Name of the run in logs and trackers."] = "mamba"
    seed: Annotated[
        int,
        NOT_NEGATIVE,
        "Seed of initialisation, data order, held-out split and dropout.",
    ] = 42
    output_dir: Annotated[str, NOT_EMPTY, "Folder of checkpoints and metrics."] = "checkpoints"
    log_dir: Annotated[str, NOT_EMPTY, "Folder of log files."] = "logs"
    tensorboard_dir: Annotated[str, NOT_EMPTY, "Folder of TensorBoard's events."] = "runs"
    sample_prompt: Annotated[
        str,
        "If not empty, sample a continuation of it after each evaluation.",
    ] = ""
    trackers: Annotated[
        str,
        "wandb, mlflow or wandb,mlflow; each needs the extra with its name.",
    ] = ""
    model: ModelConfig = ModelConfig()  # noqa: RUF009 (it is frozen)
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
    """Returns the fields of ``config.to_dict`` by dotted name; other values become text."""
    flat: dict[str, Value] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            flat[prefix + name] = value if plain else str(value)
    return flat
