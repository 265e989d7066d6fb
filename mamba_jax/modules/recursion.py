"""The recursive processor: one shared transform and a learned depth gate.

    s_0 = h;   s_{k+1} = s_k + g_k · (R(norm(s_k) + e_k) + read(s_k)),   k = 0 … K-1
    R(x) = down(silu(up(x)))

The gate g_k is a number per token, or one per channel that all tokens share (``DepthGate``). The
vectors e_k exist with ``config.pass_embedding`` only.

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

Row = tuple[tuple[jax.Array, ...], jax.Array | None]  # a step's gate parameters, its embedding


class DepthGate(nnx.Module):
    """The factor of a step's change; ``config.gate`` chooses:

    * "token": ``sigmoid(w_k · rms(s_k) + b_k)``: kernel (k, d) from zero, bias (k);
    * "channel": scale (k, d), the same for all tokens, from sigmoid(``config.gate_bias``).

    With ``config.shared_gate`` k is 1: one row for all steps, however many they are.
    """

    def __init__(self, config: ModelConfig):
        self.depth, self.eps = config.recursion_depth, config.norm_eps
        rows, d = 1 if config.shared_gate else self.depth, config.d_model
        self.by_token = config.gate == "token"
        if self.by_token:
            self.kernel = nnx.Param(jnp.zeros((rows, d), jnp.float32))
            self.bias = nnx.Param(jnp.full(rows, config.gate_bias, jnp.float32))
        else:
            start = jax.nn.sigmoid(jnp.float32(config.gate_bias))
            self.scale = nnx.Param(jnp.full((rows, d), start, jnp.float32))

    def rows(self) -> tuple[jax.Array, ...]:
        """Returns the parameters with an entry for each step on their first axis."""
        own = (self.kernel[...], self.bias[...]) if self.by_token else (self.scale[...],)
        return tuple(jnp.broadcast_to(leaf, (self.depth, *leaf.shape[1:])) for leaf in own)

    def __call__(self, s_btd: jax.Array, *row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies the gate of one step.

        Args:
          s_btd: float32 state before the step.
          *row: the step's entries of ``rows``.

        Returns:
          The factor of the step's change, float32, (b, t, 1) or (d,); and the gate to report of
          each token, (b, t) float32: the mean over its channels.
        """
        if not self.by_token:
            (scale_d,) = row
            return scale_d, jnp.broadcast_to(scale_d.mean(), s_btd.shape[:2])
        weight_d, bias = row
        # In full float32: a GPU's or TPU's default would round the product's inputs.
        logit_bt = jnp.einsum(
            "btd,d->bt", rms_normalise(s_btd, self.eps), weight_d, precision="highest"
        )
        gate_bt = jax.nn.sigmoid(logit_bt + bias)
        return gate_bt[..., None], gate_bt


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
        # Zeros: the model starts as it would without them.
        zeros_kd = jnp.zeros((config.recursion_depth, d), jnp.float32)
        self.pass_embedding = nnx.Param(zeros_kd) if config.pass_embedding else None
        self.skip_threshold = config.gate_skip_threshold

    @jax.named_scope("recursion")
    def __call__(
        self,
        h_btd: jax.Array,
        read: Callable[[jax.Array], jax.Array] | None,
        active_b: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the steps.

        With a ``skip_threshold`` above 0 a token skips the steps whose gates do not exceed it: its
        gates there are 0. A step that no token takes is not computed.
        What a token gets depends on its own gates alone, never on its neighbours'. Padding counts
        as tokens here: a step may be computed for it alone, which changes no result.

        Args:
          h_btd: float32 residual stream.
          read: maps the current state to what attention reads for it, (b, t, d) float32; None: no
            attention inside the recursion.
          active_b: bool, rows whose results are used; the tokens of others need no step. None: all.

        Returns:
          s_K (b, t, d) float32 and the gates (k, b, t) float32.
        """

        def advance(s_btd: jax.Array, factor: jax.Array, embedding_d: jax.Array | None):
            input_btd = self.norm(s_btd)
            if embedding_d is not None:
                input_btd = input_btd + embedding_d
            change = self.down(jax.nn.silu(self.up(input_btd.astype(self.dtype))))
            change = change.astype(jnp.float32)
            if read is not None:
                change = change + read(s_btd)
            return s_btd + factor * change

        def step(s_btd: jax.Array, row: Row) -> tuple[jax.Array, jax.Array]:
            gate_row, embedding_d = row
            factor, gate_bt = self.gate(s_btd, *gate_row)
            if not self.skip_threshold:
                return advance(s_btd, factor, embedding_d), gate_bt
            taken_bt = gate_bt > self.skip_threshold
            if active_b is not None:
                taken_bt &= active_b[:, None]
            gate_bt = jnp.where(taken_bt, gate_bt, 0.0)
            s_btd = jax.lax.cond(
                taken_bt.any(),
                lambda: advance(s_btd, gate_bt[..., None], embedding_d),
                lambda: s_btd,
            )
            return s_btd, gate_bt

        # A loop over one body: the program does not grow with the depth.
        embedding_kd = None if self.pass_embedding is None else self.pass_embedding[...]
        return jax.lax.scan(step, h_btd, (self.gate.rows(), embedding_kd))
