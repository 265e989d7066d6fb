"""Configuration: an ``ml_collections.ConfigDict`` at the edge, frozen dataclasses inside.

``schema`` and ``model`` hold the fields, ``plan`` reads layer plans, ``presets`` has the tables of
sizes and training presets, ``files`` reads config files and overrides, ``checks`` refuses what
cannot work.
"""

from mamba_jax.config.files import (
    apply_overrides,
    freeze,
    from_dict,
    from_json,
    load_config,
    load_json,
)
from mamba_jax.config.presets import (
    default_config,
    for_inference,
    merge,
    preset_config,
    size_fields,
    training_fields,
)
from mamba_jax.config.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
    VramConfig,
    to_dict,
)

__all__ = [
    "DataConfig",
    "ModelConfig",
    "ParallelConfig",
    "PhaseConfig",
    "RunConfig",
    "SourceConfig",
    "TrainingConfig",
    "VramConfig",
    "apply_overrides",
    "default_config",
    "for_inference",
    "freeze",
    "from_dict",
    "from_json",
    "load_config",
    "load_json",
    "merge",
    "preset_config",
    "size_fields",
    "to_dict",
    "training_fields",
]
