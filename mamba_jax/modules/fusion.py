"""Fuses what the mixer and the recursion found: concat, projection, and mostly a norm.

Legend: b batch, t time, d d_model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from mamba_jax.config import ModelConfig
from mamba_jax.modules.mamba import uniform_fan_in
from mamba_jax.modules.norm import RMSNorm
from mamba_jax.ops.dot_by_rows import dot_by_rows


class Fusion(nnx.Module):
    """By ``config.fusion``, of the stream h, the mixer's part m and the recursion's r:

    * "residual_norm": ``h + gain · rms(W [m ; r])``;
    * "residual_zero": ``h + r + W [m ; r]``, W from zero: at the start it is their sum;
    * "norm": ``rms(W [m ; r])``, which cuts the residual path, so that deep models train worse; it
      is kept for comparison.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        d = config.d_model
        self.form = config.fusion
        from_zero = self.form == "residual_zero"
        self.dtype = dtype
        self.proj = nnx.Linear(
            2 * d,
            d,
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=initializers.zeros if from_zero else uniform_fan_in(2 * d),
            rngs=rngs,
        )
        gain = config.fusion_gain if self.form == "residual_norm" else 1.0
        self.norm = None if from_zero else RMSNorm(d, config.norm_eps, init=gain)

    @jax.named_scope("fusion")
    def __call__(self, h_btd: jax.Array, m_btd: jax.Array, r_btd: jax.Array) -> jax.Array:
        """Combines float32 (b, t, d): h the stream, m the mixer's part, r the recursion's."""
        both = jnp.concatenate([m_btd, r_btd], axis=-1).astype(self.dtype)
        fused_btd = self.proj(both)
        if self.norm is None:
            return h_btd + r_btd + fused_btd.astype(jnp.float32)
        fused_btd = self.norm(fused_btd)
        return h_btd + fused_btd if self.form == "residual_norm" else fused_btd
