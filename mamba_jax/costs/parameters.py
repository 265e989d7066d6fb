"""Counts a model's parameters from its structure alone: no array, no tracing."""

import dataclasses

from mamba_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Exact numbers of parameters."""

    total: int
    non_embedding: int  # without the token table and an untied head


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of ``models.build.init``; ``config.vocab_size`` must be set."""
    table = config.padded_vocab_size * config.d_model
    layers = sum(count * layer_parameters(layer) for layer, count in config.layer_counts)
    rest = layers + config.d_model  # the final norm
    tables = table if config.tie_embeddings else 2 * table
    return ParameterCount(rest + tables, rest)


def layer_parameters(config: ModelConfig) -> int:
    """Counts the parameters of one layer; ``config`` is of its kind alone.

    Legend: d d_model, e d_inner, n d_state, r dt_rank, k conv width.
    """
    d, e, n = config.d_model, config.d_inner, config.d_state
    r, k = config.resolved_dt_rank, config.d_conv
    norm, conv1d = d, (k + 1) * e
    in_proj, x_proj, dt_proj, out_proj = 2 * d * e, e * (r + 2 * n), (r + 1) * e, e * d
    count = norm + in_proj + conv1d + x_proj + dt_proj + e * n + e + out_proj  # A_log, D
    if config.family == "mamba":
        return count
    if config.recursion_depth > 0:
        hidden, depth = config.recursion_expand * d, config.recursion_depth
        gates = (1 if config.shared_gate else depth) * (d + (config.gate == "token"))
        count += d + 2 * d * hidden + gates + depth * d * config.pass_embedding
    if config.attention_scales:
        mixture = len(config.attention_scales) * config.n_heads
        count += d + 3 * d * d + 2 * config.head_size + mixture + d * d
    if config.fusion != "sum":
        count += 2 * d * d
    if config.fusion in ("residual_norm", "norm"):
        count += d
    return count
