"""The modules of a whole language model; only ``models.build`` uses them."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from mamba_jax.config import ModelConfig
from mamba_jax.modules.block import HybridBlock, MambaBlock
from mamba_jax.modules.norm import RMSNorm

BLOCKS = {"mamba": MambaBlock, "hybrid": HybridBlock}
EMBEDDING_STD = 0.02  # the reference implementation's


class Embedding(nnx.Module):
    """The token table (v, d); with tied embeddings it is the head's matrix too."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_table(config, EMBEDDING_STD, rngs))


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


class LanguageModel(nnx.Module):
    """Embedding, stacked layers (their parameters carry a leading layer axis), norm, head."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs: nnx.Rngs) -> MambaBlock:
            return BLOCKS[config.family](config, dtype, rngs=rngs)

        self.embed = Embedding(config, rngs=rngs)
        self.layers = make_layers(rngs)
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs)


def matmul_dtype(config: ModelConfig) -> jnp.dtype:
    """Resolves ``config.dtype``: "auto" is float32 on a CPU, whose bfloat16 matmuls are slow."""
    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
