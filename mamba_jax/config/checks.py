"""What the values of a config must be, beyond their types; ``config.freeze`` asks."""

import math
from collections.abc import Sequence
from typing import Any

from mamba_jax.config.schema import DataConfig, ModelConfig, RunConfig, VramConfig
from mamba_jax.errors import UserError, did_you_mean

_CHOICES = {
    "model.family": ("mamba", "hybrid"),
    "model.dtype": ("auto", "bfloat16", "float32"),
    "model.remat": ("auto", "none", "dots", "full"),
    "model.scan": (
        "auto",
        "reference",
        "sequential",
        "associative",
        "chunked",
        "pallas_gpu",
        "pallas_tpu",
    ),
    "model.fusion": ("residual_norm", "norm", "sum"),
    "data.deduplicate": ("exact", "near", "none"),
    "data.window": ("packed", "concat", "document"),
    "data.loss_on": ("all", "answer"),
}
_TRACKERS = ("wandb", "mlflow")
_POSITIVE = (
    "model.d_model",
    "model.n_layers",
    "model.d_state",
    "model.d_conv",
    "model.expand_factor",
    "model.max_seq_len",
    "model.norm_eps",
    "model.recursion_expand",
    "model.attention_window",
    "training.learning_rate",
    "training.max_steps",
    "training.gradient_clip",
    "training.adam_eps",
    "training.max_gradient_norm",
    "training.log_steps",
    "training.save_steps",
    "training.eval_steps",
    "training.keep_last",
    "vram.effective_batch_size",
    "vram.memory_gb",
    "parallel.fsdp",
)
_NOT_NEGATIVE = (
    "seed",
    "model.dt_rank",
    "model.vocab_size",
    "model.recursion_depth",
    "model.attention_head_size",
    "training.warmup_steps",
    "training.loss_chunk_tokens",
    "training.weight_decay",
    "training.skip_spikes",
    "training.eval_windows",
    "data.tokenise_workers",
    "training.keep_every",
    "vram.batch_size",
    "vram.gradient_accumulation_steps",
    "vram.safety_margin_mb",
)
_SHARES = (
    "model.dropout",
    "model.gate_skip_threshold",
    "training.beta1",
    "training.beta2",
    "training.min_learning_rate_ratio",
    "data.eval_fraction",
)


def check(run: "RunConfig") -> None:
    """Refuses values that cannot work.

    Raises:
      UserError: naming the first of them.
    """

    def value(name: str) -> Any:
        target: Any = run
        for part in name.split("."):
            target = getattr(target, part)
        return target

    for name in _CHOICES:
        check_choice(name, value(name))
    for name in _POSITIVE:
        if not value(name) > 0:
            raise UserError(f"{name}={value(name)} must be greater than 0")
    for name in _NOT_NEGATIVE:
        if not value(name) >= 0:
            raise UserError(f"{name}={value(name)} must not be negative")
    for name in _SHARES:
        if not 0 <= value(name) <= 1 or (
            name != "training.min_learning_rate_ratio" and value(name) == 1
        ):
            raise UserError(f"{name}={value(name)} must lie between 0 and 1")
    _check_model(run.model)
    _check_data(run.data)
    _check_vram(run.vram)
    if run.seed >= 2**32:
        raise UserError(f"seed={run.seed} must be below 2**32")
    for name in ("name", "output_dir", "log_dir", "tensorboard_dir"):
        if not value(name):
            raise UserError(f"{name} must not be empty")
    for tracker in run.tracker_names:
        if tracker not in _TRACKERS:
            raise UserError(
                f'trackers="{run.trackers}": "{tracker}" is not one of {", ".join(_TRACKERS)}'
                f"{did_you_mean(tracker, _TRACKERS)}"
            )


def _check_data(data: "DataConfig") -> None:
    if not 0 <= data.fim_rate <= 1:
        raise UserError(f"data.fim_rate={data.fim_rate} must lie between 0 and 1")
    if data.fim_rate and data.loss_on == "answer":
        raise UserError(
            f"data.fim_rate={data.fim_rate} tears answers from their prompts; with "
            'data.loss_on="answer" leave it at 0'
        )
    if not data.mixture:
        if data.curriculum:
            raise UserError("data.curriculum has no use without a data.mixture")
        _check_source(data)
        return
    for name in ("data_dir", "dataset", "tasks"):
        if value := getattr(data, name):
            raise UserError(f'data.{name}="{value}" beside a data.mixture: make it a source of it')
    for number, source in enumerate(data.mixture):
        if not source.data_dir and not source.dataset and not source.tasks:
            raise UserError(f"data.mixture[{number}] needs a data_dir, a dataset or tasks")
    for one in data.sources:
        _check_source(one)
    _check_weights("data.mixture", [source.weight for source in data.mixture], len(data.mixture))
    steps = [phase.step for phase in data.curriculum]
    if steps and (steps[0] != 0 or sorted(set(steps)) != steps):
        raise UserError(f"data.curriculum has steps {steps}: they must begin with 0 and rise")
    for number, phase in enumerate(data.curriculum):
        _check_weights(f"data.curriculum[{number}]", phase.weights, len(data.mixture))


def _check_weights(name: str, weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise UserError(f"{name} has {len(weights)} weights for {count} sources")
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise UserError(f"{name} has weights {tuple(weights)}: give numbers from 0 up, one above 0")


def _check_source(data: "DataConfig") -> None:
    if data.task_examples < 1:
        raise UserError(f"data.task_examples={data.task_examples} must be at least 1")
    if data.dataset:
        if data.tasks:
            raise UserError(
                f'data.tasks="{data.tasks}" beside data.dataset="{data.dataset}": make each a '
                "source of a mixture"
            )
        if not data.dataset_split:
            raise UserError("data.dataset_split must not be empty")
        return
    for name in ("dataset_config", "dataset_split", "dataset_streaming", "text_column"):
        if (given := getattr(data, name)) != getattr(type(data), name):
            raise UserError(f'data.{name}="{given}" has no use without a data.dataset (--dataset)')


def _check_vram(vram: "VramConfig") -> None:
    effective, accumulation = vram.effective_batch_size, vram.gradient_accumulation_steps
    if not vram.batch_size and accumulation and effective % accumulation:
        raise UserError(
            f"vram.effective_batch_size={effective} is not divisible by "
            f"gradient_accumulation_steps={accumulation}; choose a divisor, or 0"
        )
    if vram.batch_size and vram.batch_size * vram.accumulation_steps != effective:
        raise UserError(
            f"vram.effective_batch_size={effective} is not batch_size="
            f"{vram.batch_size} × gradient_accumulation_steps={vram.accumulation_steps}; "
            "choose a batch_size that divides the effective batch, or 0"
        )
    if not vram.auto and vram.safety_margin_mb >= vram.memory_gb * 1024:
        raise UserError(
            f"vram.safety_margin_mb={vram.safety_margin_mb} leaves nothing of "
            f"vram.memory_gb={vram.memory_gb:g} ({vram.memory_gb * 1024:.0f} MB); "
            "lower --vram_safety_margin"
        )


def check_choice(name: str, value: Any) -> None:
    """Refuses a value that is none of a field's choices; suggests the nearest."""
    choices = _CHOICES[name]
    if value not in choices:
        raise UserError(
            f'{name}="{value}" is not one of {", ".join(choices)}'
            f"{did_you_mean(str(value), choices)}"
        )


def _check_model(model: "ModelConfig") -> None:
    if model.family == "mamba":
        return
    if model.attention_scales:
        if any(scale < 1 for scale in model.attention_scales) or len(
            set(model.attention_scales)
        ) != len(model.attention_scales):
            raise UserError(
                f"model.attention_scales={model.attention_scales} must be different "
                "whole numbers from 1 up"
            )
        if model.d_model % 2:
            raise UserError(
                f"model.d_model={model.d_model} must be even for the hybrid's attention"
            )
        if model.head_size % 2 or model.d_model % model.head_size:
            raise UserError(
                f"model.d_model={model.d_model} is not divisible by an even "
                f"model.attention_head_size={model.head_size}; choose a divisor, or 0"
            )
