"""Checks the values of a config, beyond their types; ``config.freeze`` calls it."""

import math
from collections.abc import Sequence
from typing import Any

from mamba_jax.config.fields import fields
from mamba_jax.config.schema import DataConfig, ModelConfig, RunConfig, VramConfig
from mamba_jax.errors import UserError, did_you_mean

_TRACKERS = ("wandb", "mlflow")
_FIELDS = {field.name: field for field in fields(RunConfig)}


def check(run: RunConfig) -> None:
    """Refuses values that cannot work.

    Raises:
      UserError: names the first invalid value.
    """

    def value(name: str) -> Any:
        target: Any = run
        for part in name.split("."):
            target = getattr(target, part)
        return target

    for name in _FIELDS:
        check_value(name, value(name))
    check_model(run.model)
    _check_data(run.data)
    _check_vram(run.vram)
    if run.seed >= 2**32:
        raise UserError(f"seed={run.seed} must be below 2**32")
    for tracker in run.tracker_names:
        if tracker not in _TRACKERS:
            raise UserError(
                f'trackers="{run.trackers}": "{tracker}" is not one of {", ".join(_TRACKERS)}'
                f"{did_you_mean(tracker, _TRACKERS)}"
            )


def _check_data(data: DataConfig) -> None:
    if data.fim_rate and data.loss_on == "answer":
        raise UserError(
            f"data.fim_rate={data.fim_rate} separates answers from their prompts; "
            'set it to 0 with data.loss_on="answer"'
        )
    if not data.mixture:
        if data.curriculum:
            raise UserError("data.curriculum has no effect without a data.mixture")
        _check_source(data)
        return
    for name in ("data_dir", "dataset", "tasks"):
        if value := getattr(data, name):
            raise UserError(
                f'data.{name}="{value}" cannot be combined with a data.mixture; '
                "make it a source of the mixture"
            )
    for number, source in enumerate(data.mixture):
        if not source.data_dir and not source.dataset and not source.tasks:
            raise UserError(f"data.mixture[{number}] needs a data_dir, a dataset or tasks")
    for one in data.sources:
        _check_source(one)
    _check_weights("data.mixture", [source.weight for source in data.mixture], len(data.mixture))
    steps = [phase.step for phase in data.curriculum]
    if steps and (steps[0] != 0 or sorted(set(steps)) != steps):
        raise UserError(f"data.curriculum has steps {steps}: they must start at 0 and increase")
    for number, phase in enumerate(data.curriculum):
        _check_weights(f"data.curriculum[{number}]", phase.weights, len(data.mixture))


def _check_weights(name: str, weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise UserError(f"{name} has {len(weights)} weights for {count} sources")
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise UserError(
            f"{name} has weights {tuple(weights)}: none may be negative, and not all may be 0"
        )


def _check_source(data: DataConfig) -> None:
    if data.task_examples < 1:
        raise UserError(f"data.task_examples={data.task_examples} must be at least 1")
    if data.dataset:
        if data.tasks:
            raise UserError(
                f'data.tasks="{data.tasks}" cannot be combined with data.dataset="{data.dataset}"; '
                "make each a source of a mixture"
            )
        if not data.dataset_split:
            raise UserError("data.dataset_split must not be empty")
        return
    for name in ("dataset_config", "dataset_split", "dataset_streaming", "text_column"):
        if (given := getattr(data, name)) != getattr(type(data), name):
            raise UserError(
                f'data.{name}="{given}" has no effect without a data.dataset (--dataset)'
            )


def _check_vram(vram: VramConfig) -> None:
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


def check_value(name: str, value: Any) -> None:
    """Refuses a value that a field does not take alone, whatever the others are.

    Raises:
      UserError: names the value, and the choices with the nearest one, or the constraint.
    """
    choices, constraint = _FIELDS[name].choices, _FIELDS[name].constraint
    if constraint and not constraint.holds(value):
        raise UserError(
            f"{name}={value} {constraint.words}" if value != "" else f"{name} {constraint.words}"
        )
    if choices and value not in choices:
        raise UserError(
            f'{name}="{value}" is not one of {", ".join(choices)}'
            f"{did_you_mean(str(value), choices)}"
        )


def _check_plan(model: ModelConfig) -> None:
    if not model.plan:
        return
    kinds, shown = model.kinds, f'model.plan="{model.plan}"'
    if len(kinds) != model.n_layers:
        raise UserError(
            f"{shown} has {len(kinds)} layers, model.n_layers={model.n_layers}; give "
            f"--config.model.n_layers={len(kinds)}, or another plan"
        )
    if model.family == "mamba" and set(kinds) != {"M"}:
        raise UserError(
            f"{shown} has other layers than M; give --config.model.family=hybrid, or another plan"
        )
    if "A" in kinds and not model.attention_scales:
        raise UserError(
            f"{shown} has layers that read attention (A), but model.attention_scales=(); give "
            "scales, or write M for A"
        )


def _check_gates(model: ModelConfig) -> None:
    if model.pass_embedding and model.shared_gate:
        raise UserError(
            f"model.pass_embedding={model.pass_embedding} has a vector for each recursion step, "
            f"which model.shared_gate={model.shared_gate} rules out; set one of them to false"
        )
    if model.gate_skip_threshold > 0 and model.gate == "channel":
        raise UserError(
            f"model.gate_skip_threshold={model.gate_skip_threshold} skips steps by each "
            f'token\'s gate, but model.gate="{model.gate}" has none; set the threshold to 0'
        )


def check_model(model: ModelConfig) -> None:
    """Refuses fields of a model that cannot work together.

    Raises:
      UserError: names the values.
    """
    _check_plan(model)
    if model.family == "mamba":
        return
    if model.gated_layers:
        _check_gates(model)
    if model.attention_scales:
        if any(scale < 1 for scale in model.attention_scales) or len(
            set(model.attention_scales)
        ) != len(model.attention_scales):
            raise UserError(
                f"model.attention_scales={model.attention_scales} must be distinct "
                "whole numbers of at least 1"
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
