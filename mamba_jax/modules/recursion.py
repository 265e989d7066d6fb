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
        self,
        h_btd: jax.Array,
        read: Callable[[jax.Array], jax.Array] | None,
        active_b: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the steps.

        With a ``skip_threshold`` above 0 a token stops before the first step whose gate does not
        exceed it: that gate and all later ones are 0. A step that no token needs is not computed.
        What a token gets depends on its own gates alone, never on its neighbours'.

        Args:
          h_btd: float32 residual stream.
          read: maps the current state to what attention reads for it, (b, t, d) float32; None: no
            attention inside the recursion.
          active_b: bool, rows whose results are used; the tokens of others need no step. None: all.

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
            return advance(s_btd, gate_bt), gate_bt

        def step_or_stop(carry: tuple[jax.Array, jax.Array], gate_row: tuple[jax.Array, jax.Array]):
            s_btd, running_bt = carry
            gate_bt = self.gate(s_btd, *gate_row)
            running_bt = running_bt & (gate_bt > self.skip_threshold)
            gate_bt = jnp.where(running_bt, gate_bt, 0.0)
            s_btd = jax.lax.cond(running_bt.any(), advance, lambda s_btd, _: s_btd, s_btd, gate_bt)
            return (s_btd, running_bt), gate_bt

        # A loop over one body: the program does not grow with the depth.
        gate_rows = (self.gate.kernel[...], self.gate.bias[...])
        if not self.skip_threshold:
            return jax.lax.scan(step, h_btd, gate_rows)
        active_b = jnp.ones(len(h_btd), bool) if active_b is None else active_b
        running_bt = jnp.broadcast_to(active_b[:, None], h_btd.shape[:2])
        (s_btd, _), gates_kbt = jax.lax.scan(step_or_stop, (h_btd, running_bt), gate_rows)
        return s_btd, gates_kbt
