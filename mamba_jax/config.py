"""Configuration: an ``ml_collections.ConfigDict`` at the edge, frozen dataclasses inside.

A config file is a Python file with ``get_config() -> ConfigDict``; it starts from
``default_config()`` or ``preset_config(size, training_preset)`` and changes fields. Every field can
be overridden on the command line as ``--config.group.field=value``. ``freeze`` turns the result
into a ``RunConfig``; whatever is wrong with it is a ``UserError`` that names the value.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mamba_jax import config_checks as checks
from mamba_jax import paths, presets
from mamba_jax.errors import UserError, did_you_mean

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


def default_config() -> ConfigDict:
    """Returns the built-in defaults (size ``medium``, preset ``default``) to start a file from."""
    return ConfigDict(to_dict(RunConfig()))


def preset_config(model_size: str, training_preset: str = "default") -> ConfigDict:
    """Returns the defaults with one row of each table of ``presets`` put in.

    Raises:
      UserError: if either name is unknown; it suggests the nearest.
    """
    config = default_config()
    config.update(name=model_size, output_dir=f"checkpoints/{model_size}")
    merge(config, size_fields(model_size))
    merge(config, training_fields(training_preset))
    return config


def size_fields(name: str) -> dict[str, Any]:
    """Returns the fields that a row of ``presets.SIZES`` sets, in their group.

    Raises:
      UserError: if there is none of that name; it suggests the nearest.
    """
    size = _look_up(presets.SIZES, name, "model size")
    return {
        "model": {
            "family": size.family,
            "d_model": size.d_model,
            "n_layers": size.n_layers,
            # A plain Mamba keeps the default: it has no recursion, whatever the number.
            "recursion_depth": size.depth or ModelConfig.recursion_depth,
        }
    }


def training_fields(preset: str) -> dict[str, Any]:
    """Returns the fields that a row of ``presets.TRAINING_PRESETS`` sets, in their group.

    Raises:
      UserError: if there is none of that name; it suggests the nearest.
    """
    row = _look_up(presets.TRAINING_PRESETS, preset, "training preset")
    return {"training": dataclasses.asdict(row)}


def merge(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets the given fields, group by group; ``config`` is changed.

    Raises:
      UserError: if a group of ``config`` is none.
    """
    with config.unlocked(), config.ignore_type():
        for name, value in values.items():
            if not isinstance(value, Mapping):
                config[name] = value
                continue
            if name not in config:
                config[name] = ConfigDict()
            group: Any = config[name]
            if not isinstance(group, ConfigDict):
                raise UserError(f"config group {name} must hold fields, not {group!r}")
            merge(group, value)


def _look_up(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UserError(
            f'unknown {what} "{name}"{did_you_mean(name, table)} (choices: {", ".join(table)})'
        )
    return table[name]


def with_scan(model: ModelConfig, scan: str) -> ModelConfig:
    """Returns the same model, computed by another implementation of the scan.

    Raises:
      UserError: if there is none of that name.
    """
    checks.check_choice("model.scan", scan)
    return dataclasses.replace(model, scan=scan)


def load_config(path: str) -> ConfigDict:
    """Runs ``get_config()`` of a Python config file.

    Raises:
      UserError: if the file is missing, does not run, or has no ``get_config``.
    """
    file = _existing_file(path)
    if file.suffix != ".py":
        raise UserError(
            f"config file {path} is neither a .py file with a get_config() function nor .json"
        )
    try:
        spec = importlib.util.spec_from_file_location(f"mamba_jax_config_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    except Exception as error:  # a config file is a program: anything may come out of it
        raise UserError(
            f"config file {path} is broken: {type(error).__name__}: {error}; "
            "it must define get_config() and return a ConfigDict"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config file {path}: get_config() must return a ConfigDict, not {config!r}"
        )
    return config


def load_json(path: str) -> dict[str, Any]:
    """Reads a JSON config file: some fields, in their groups ``model``, ``training``, ``vram`` ….

    Returns:
      The fields that the file names, and no others, checked and of their types.

    Raises:
      UserError: if the file is missing or no JSON object, or has an unknown or repeated field or
        one of a wrong type.
    """
    file = _existing_file(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if not isinstance(values, dict):
            raise UserError(f'must hold an object of groups such as "model", not {values!r:.40}')
        return _only(values, to_dict(from_dict(values)))
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # with the line and column
        raise UserError(f"config file {path} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f'"{repeated}" is given twice in one group')
    return values


def _only(names: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of ``values`` what ``names`` has, group by group."""
    return {
        name: _only(names[name], value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name in names
    }


def _existing_file(path: str) -> pathlib.Path:
    file = pathlib.Path(path)
    if not file.is_file():
        beside = (other.name for other in file.parent.glob("*") if other.suffix in (".py", ".json"))
        raise UserError(f"config file {path} does not exist{did_you_mean(file.name, beside)}")
    return file


def apply_overrides(
    config: ConfigDict, overrides: Mapping[str, str], flags: Mapping[str, str] | None = None
) -> None:
    """Sets dotted fields from the command line's text, e.g. ``{"training.max_steps": "200"}``.

    Args:
      config: is changed.
      overrides: field → text.
      flags: field → the flag it was given by, for messages; ``--config.field`` otherwise.

    Raises:
      UserError: if a field does not exist (suggesting the nearest) or the text does not fit it.
    """
    fields = _field_types(RunConfig)
    for name, text in overrides.items():
        flag = (flags or {}).get(name, f"--config.{name}")
        if name not in fields:
            raise UserError(f"unknown config field {flag}{_nearest_field(name, fields)}")
        *groups, leaf = name.split(".")
        target: Any = config
        for group in groups:
            if group not in target:
                raise UserError(f"{flag}: the config file has no group {group}")
            target = target[group]
        with target.unlocked(), target.ignore_type():
            target[leaf] = _parse(text, fields[name], flag)


def freeze(config: ConfigDict) -> RunConfig:
    """Checks a config and makes it immutable.

    Raises:
      UserError: on an unknown or missing field, a wrong type or a value that cannot work.
    """
    run = from_dict(config.to_dict())
    checks.check(run)
    return run


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the config as plain JSON types; ``from_dict`` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a ``RunConfig`` from nested plain values; absent fields take their default."""
    return _build(RunConfig, values, "")


def from_json(text: str) -> RunConfig:
    """Reads what ``json.dumps(to_dict(config))`` wrote."""
    return from_dict(json.loads(text))


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    types_ = typing.get_type_hints(cls)
    for name in values:
        if name not in types_:
            known = types_ if "[" in prefix else _field_types(RunConfig)  # in a list
            near = (
                did_you_mean(name, known) if "[" in prefix else _nearest_field(prefix + name, known)
            )
            raise UserError(f'unknown config field "{prefix}{name}"{near}')
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types_[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"config group {prefix}{name} must hold fields, not {value!r}")
            made[name] = _build(typing.cast(type, types_[name]), value, f"{prefix}{name}.")
        else:
            value = paths.expand(name, value) if isinstance(value, str) else value
            made[name] = _coerce(value, types_[name], prefix + name)
    return cls(**made)


def _field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Returns dotted name → type of every leaf field."""
    leaves: dict[str, Any] = {}
    for name, type_ in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(type_):
            leaves |= _field_types(typing.cast(type, type_), f"{prefix}{name}.")
        else:
            leaves[prefix + name] = type_
    return leaves


def _nearest_field(name: str, fields: Mapping[str, Any]) -> str:
    """Suggests the field nearest by full name, else by last part (a field put in a wrong group)."""
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [field for field in fields if field.rsplit(".", 1)[-1] == leaf]
    return did_you_mean(name, same_leaf) or did_you_mean(name, fields)


def _parse(text: str, type_: Any, name: str) -> Any:
    if type_ is str:
        return text
    if type_ is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return _coerce(ast.literal_eval(text), type_, name)
    except (ValueError, SyntaxError):
        raise UserError(f"{name}={text!r} is not {_describe(type_)}") from None


def _coerce(value: Any, type_: Any, name: str) -> Any:
    """Accepts ``value`` as ``type_``: whole floats as int (3e4), ints as float, lists as tuple."""
    if isinstance(type_, types.GenericAlias):  # tuple[int, ...]
        if isinstance(value, (list, tuple)):
            item = typing.get_args(type_)[0]
            return tuple(_coerce_item(each, item, f"{name}[{i}]") for i, each in enumerate(value))
    elif type_ is int and type(value) in (int, float) and value % 1 == 0:
        return int(value)
    elif type_ is float and type(value) in (int, float):
        return float(value)
    elif type(value) is type_:
        return value
    raise UserError(f"{name}={value!r} is not {_describe(type_)}")


def _coerce_item(value: Any, type_: Any, name: str) -> Any:
    if not dataclasses.is_dataclass(type_):
        return _coerce(value, type_, name)
    if isinstance(value, typing.cast(type, type_)):  # an override, parsed already
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must hold fields, not {value!r}")
    return _build(typing.cast(type, type_), value, f"{name}.")


def _describe(type_: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(type_, "a list such as (1,2,4)")
