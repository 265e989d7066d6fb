"""The tables of sizes and training presets, as data.

``d_model``, ``n_layers`` and ``depth`` define a size. ``nominal`` is only its familiar name: the
actual parameter count follows from the structure (``mamba-jax report presets``) and is always
printed with it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mamba_jax.config import checks
from mamba_jax.config.fields import describe
from mamba_jax.config.schema import ModelConfig, RunConfig, to_dict
from mamba_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class SizePreset:
    """One model size: the structure and the labels it is known by."""

    name: str
    family: str  # "mamba" or "hybrid"
    nominal: str  # the label, not a count
    d_model: int
    n_layers: int
    depth: int  # recursion steps; 0 for plain Mamba
    use_case: str
    parameters: int  # with the GPT-2 vocabulary; a test compares it with the structure


@dataclasses.dataclass(frozen=True)
class TrainingPreset:
    """One training schedule."""

    learning_rate: float
    warmup_steps: int
    max_steps: int
    save_steps: int
    eval_steps: int
    gradient_clip: float


SIZES: dict[str, SizePreset] = {
    row[0]: SizePreset(*row)
    for row in (
        ("small", "mamba", "50M", 384, 6, 0, "Testing, edge devices", 25_102_464),
        ("medium-lite", "mamba", "90M", 512, 8, 0, "Balanced performance", 39_318_016),
        ("medium-plus", "mamba", "120M", 640, 9, 0, "Good quality", 55_874_560),
        ("medium-x", "mamba", "150M", 704, 10, 0, "High quality", 67_172_160),
        ("medium", "mamba", "200M", 768, 12, 0, "Production quality", 83_894_016),
        ("medium-extra", "mamba", "250M", 832, 13, 0, "Near-large quality", 99_297_536),
        ("large-lite", "mamba", "300M", 896, 14, 0, "Cost-effective large", 116_712_064),
        ("large-plus", "mamba", "400M", 960, 15, 0, "High performance", 136_291_200),
        ("large", "mamba", "500M", 1024, 16, 0, "Professional grade", 158_188_544),
        ("xlarge", "mamba", "750M", 1280, 20, 0, "Research, enterprise", 272_032_000),
        ("xxlarge", "mamba", "1B", 1536, 24, 0, "Maximum capability", 435_254_784),
        ("hybrid-small", "hybrid", "75M", 512, 8, 3, "Entry-level reasoning", 60_315_352),
        ("hybrid-small-mini", "hybrid", "100M", 576, 9, 3, "Balanced reasoning", 78_105_870),
        ("hybrid-small-standard", "hybrid", "112M", 608, 10, 3, "Recommended on 16GB", 91_368_440),
        ("hybrid-small-plus", "hybrid", "125M", 640, 10, 3, "High-quality reasoning", 99_505_610),
        ("hybrid-small-pro", "hybrid", "165M", 704, 11, 3, "Maximum for 16 GB", 124_913_932),
        ("hybrid-medium", "hybrid", "220M", 768, 12, 3, "Professional reasoning", 154_730_196),
        ("hybrid-large", "hybrid", "550M", 1024, 16, 4, "Enterprise reasoning", 326_078_272),
    )
}

TRAINING_PRESETS: dict[str, TrainingPreset] = {
    "fast": TrainingPreset(5e-4, 1_000, 50_000, 2_500, 2_500, 1.0),
    "default": TrainingPreset(3e-4, 2_000, 100_000, 5_000, 5_000, 1.0),
    "careful": TrainingPreset(1e-4, 5_000, 200_000, 10_000, 10_000, 1.0),
}


def default_config() -> ConfigDict:
    """Returns the built-in defaults (size ``medium``, preset ``default``) to start a file from."""
    return ConfigDict(to_dict(RunConfig()))


def preset_config(model_size: str, training_preset: str = "default") -> ConfigDict:
    """Returns the defaults with the given row of each table of ``presets`` applied.

    Raises:
      UserError: if either name is unknown; it suggests the nearest.
    """
    config = default_config()
    config.update(name=model_size, output_dir=f"checkpoints/{model_size}")
    merge(config, size_fields(model_size))
    merge(config, training_fields(training_preset))
    return config


def size_fields(name: str) -> dict[str, Any]:
    """Returns the fields that a row of ``SIZES`` sets, in their group.

    Raises:
      UserError: if there is no such name; it suggests the nearest.
    """
    size = _look_up(SIZES, name, "model size")
    return {
        "model": {
            "family": size.family,
            "d_model": size.d_model,
            "n_layers": size.n_layers,
            "plan": "",
            # A plain Mamba keeps the default: it has no recursion, whatever the number.
            "recursion_depth": size.depth or ModelConfig.recursion_depth,
        }
    }


def training_fields(preset: str) -> dict[str, Any]:
    """Returns the fields that a row of ``TRAINING_PRESETS`` sets, in their group.

    Raises:
      UserError: if there is no such name; it suggests the nearest.
    """
    row = _look_up(TRAINING_PRESETS, preset, "training preset")
    return {"training": dataclasses.asdict(row)}


def merge(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets the given fields, group by group; ``config`` is modified in place.

    Raises:
      UserError: if a group of ``config`` is not a group.
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
                raise UserError(f"config group {name} must contain fields, not {group!r}")
            merge(group, value)


def _look_up(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UserError(
            f'unknown {what} "{name}"{did_you_mean(name, table)} (choices: {", ".join(table)})'
        )
    return table[name]


def for_inference(
    model: ModelConfig,
    *,
    scan: str | None = None,
    gate_skip_threshold: float | None = None,
    recursion_depth: int | None = None,
) -> ModelConfig:
    """Returns a trained model's structure with the fields that inference may change.

    Args:
      model: as trained.
      scan, gate_skip_threshold, recursion_depth: None keeps the model's own value.

    Raises:
      UserError: if a value is not allowed, or has no effect.
    """
    given = {
        "scan": scan,
        "gate_skip_threshold": gate_skip_threshold,
        "recursion_depth": recursion_depth,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        type_ = type(getattr(model, name))
        if not isinstance(value, (int, float) if type_ is float else type_):
            raise UserError(f"model.{name}={value!r} is not {describe(type_)}")
        checks.check_value(f"model.{name}", value)
        if value and name != "scan" and not model.gated_layers:
            raise UserError(
                f"{name}={value} has no effect on a model without recursion; leave it out"
            )
    steps = model.recursion_depth
    if recursion_depth not in (None, steps) and not (model.shared_gate and recursion_depth):
        raise UserError(
            f"recursion_depth={recursion_depth} cannot be used: only a model trained with "
            "model.shared_gate=true can run another number of steps (at least 1) than it was "
            f"trained with ({steps}); leave it out"
        )
    changed = dataclasses.replace(model, **given)
    checks.check_model(changed)
    return changed
