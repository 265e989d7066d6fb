"""The recursive processor: one shared transform and a learned, per-token depth gate.

    s_0 = h;   s_{k+1} = s_k + g_k · (R(norm(s_k)) + read(s_k)),   k = 0 … K-1
    g_k = sigmoid(w_k · rms(s_k) + b_k),   R(x) = down(silu(up(x)))

Legend: b batch, t time, d d_model, k recursion steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from mamba_jax.config import ModelConfig
from mamba_jax.modules.mamba import uniform_fan_in
from mamba_jax.modules.norm import RMSNorm, rms_normalise
from mamba_jax.ops.dot_by_rows import dot_by_rows


class DepthGate(nnx.Module):
    """A gate per step: kernel (k, d) from zero, bias (k)."""

    def __init__(self, config: ModelConfig):
        depth = config.recursion_depth
        self.kernel = nnx.Param(jnp.zeros((depth, config.d_model), jnp.float32))
        self.bias = nnx.Param(jnp.full(depth, config.gate_bias, jnp.float32))
        self.eps = config.norm_eps

    def __call__(self, s_btd: jax.Array, weight_d: jax.Array, bias: jax.Array) -> jax.Array:
        """Returns one step's weight for each token, (b, t) float32 in (0, 1)."""
        # In full float32: a GPU's or TPU's default would round the product's inputs.
        logit_bt = jnp.einsum(
            "btd,d->bt", rms_normalise(s_btd, self.eps), weight_d, precision="highest"
        )
        return jax.nn.sigmoid(logit_bt + bias)


class RecursiveProcessor(nnx.Module):
    """Applies one transform up to K times, accumulating gated results in the residual stream."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        d, hidden = config.d_model, config.recursion_expand * config.d_model
        self.dtype = dtype
        self.norm = RMSNorm(d, config.norm_eps)
        self.up = nnx.Linear(
            d,
            hidden,
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=uniform_fan_in(d),
            rngs=rngs,
        )
        # From zero: at the start a layer is the one without R, whatever the depth.
        self.down = nnx.Linear(
            hidden,
            d,
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=initializers.zeros,
            rngs=rngs,
        )
        self.gate = DepthGate(config)
        self.skip_threshold = config.gate_skip_threshold

    @jax.named_scope("recursion")
    def __call__(
        self, h_btd: jax.Array, read: Callable[[jax.Array], jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the steps; skips, if ``skip_threshold`` is not 0, those which no gate exceeds.

        Args:
          h_btd: float32 residual stream.
          read: maps the current state to what attention reads for it, (b, t, d) float32; None: no
            attention inside the recursion.

        Returns:
          s_K (b, t, d) float32 and the gates (k, b, t) float32.
        """

        def advance(s_btd: jax.Array, gate_bt: jax.Array) -> jax.Array:
            change = self.down(jax.nn.silu(self.up(self.norm(s_btd).astype(self.dtype))))
            change = change.astype(jnp.float32)
            if read is not None:
                change = change + read(s_btd)
            return s_btd + gate_bt[..., None] * change

        def step(s_btd: jax.Array, gate_row: tuple[jax.Array, jax.Array]):
            gate_bt = self.gate(s_btd, *gate_row)
            if not self.skip_threshold:
                return advance(s_btd, gate_bt), gate_bt
            needed = jnp.any(gate_bt > self.skip_threshold)
            s_btd = jax.lax.cond(needed, advance, lambda s_btd, _: s_btd, s_btd, gate_bt)
            return s_btd, gate_bt

        # A loop over one body: the program does not grow with the depth.
        return jax.lax.scan(step, h_btd, (self.gate.kernel[...], self.gate.bias[...]))
