"""Fuses what the mixer and the recursion found: concat, projection, norm.

Legend: b batch, t time, d d_model.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.config import ModelConfig
from mamba_jax.modules.mamba import uniform_fan_in
from mamba_jax.modules.norm import RMSNorm
from mamba_jax.ops.dot_by_rows import dot_by_rows


class Fusion(nnx.Module):
    """``h + gain · rms(W [m ; r])``, or without ``h +`` when ``config.fusion`` is "norm".

    "norm" cuts the residual path, so that deep models train worse; it is kept for comparison.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        d = config.d_model
        self.residual = config.fusion == "residual_norm"
        self.dtype = dtype
        self.proj = nnx.Linear(
            2 * d,
            d,
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=uniform_fan_in(2 * d),
            rngs=rngs,
        )
        self.norm = RMSNorm(d, config.norm_eps, init=config.fusion_gain if self.residual else 1.0)

    @jax.named_scope("fusion")
    def __call__(self, h_btd: jax.Array, m_btd: jax.Array, r_btd: jax.Array) -> jax.Array:
        """Combines float32 (b, t, d): h the stream, m the mixer's part, r the recursion's."""
        both = jnp.concatenate([m_btd, r_btd], axis=-1).astype(self.dtype)
        fused_btd = self.norm(self.proj(both))
        return h_btd + fused_btd if self.residual else fused_btd
