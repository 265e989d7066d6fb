"""What a model costs, from its own structure."""

import dataclasses
import math

import jax

from mamba_jax.config import ModelConfig
from mamba_jax.models import build


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Exact numbers of parameters."""

    total: int
    non_embedding: int  # without the token table and an untied head


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts parameters without allocating them."""
    tree = build.abstract_params(config)
    count = lambda part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
    total = count(tree)
    return ParameterCount(total, total - count(tree["embed"]) - count(tree.get("lm_head", {})))
