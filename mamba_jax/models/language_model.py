"""The modules of a whole language model; only ``models.build`` uses them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from mamba_jax.config import ModelConfig
from mamba_jax.modules.block import HybridBlock, MambaBlock
from mamba_jax.modules.norm import RMSNorm

BLOCKS = {"mamba": MambaBlock, "hybrid": HybridBlock}


class Embedding(nnx.Module):
    """The token table (v, d); with tied embeddings it is the head's matrix too."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_table(config, config.resolved_embedding_std, rngs))


class Head(nnx.Module):
    """The untied head's matrix (v, d): rows are tokens, as in the embedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_table(config, config.d_model**-0.5, rngs))


def _table(config: ModelConfig, std: float, rngs: nnx.Rngs) -> jax.Array:
    """Draws a row per token id; the rows beyond are zeros, as their gradients are."""
    drawn_vd = initializers.normal(std)(
        rngs.params(), (config.vocab_size, config.d_model), jnp.float32
    )
    return jnp.pad(drawn_vd, ((0, config.padded_vocab_size - config.vocab_size), (0, 0)))


class Stacks(nnx.Module):
    """The stacks of a model with layers of several kinds, each under the name of its kind."""

    def __init__(self, stacks: Mapping[str, nnx.Module]):
        for kind, stack in stacks.items():
            setattr(self, kind, stack)


class LanguageModel(nnx.Module):
    """Embedding, layers (stacked as ``models.stacks`` describes), norm, head."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        kinds = config.kinds

        def make_stack(kind: str) -> nnx.Module:
            own = config.of_kind(kind)

            @nnx.split_rngs(splits=kinds.count(kind))
            @nnx.vmap(in_axes=0, out_axes=0)
            def make_layers(rngs: nnx.Rngs) -> MambaBlock:
                return BLOCKS[own.family](own, dtype, rngs=rngs)

            return make_layers(rngs)

        self.embed = Embedding(config, rngs=rngs)
        made = {kind: make_stack(kind) for kind in sorted(set(kinds))}
        self.layers = Stacks(made) if len(made) > 1 else made[kinds[0]]
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs)


def matmul_dtype(config: ModelConfig) -> jnp.dtype:
    """Resolves ``config.dtype``: "auto" is float32 on a CPU, whose bfloat16 matmuls are slow."""
    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
