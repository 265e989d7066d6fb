"""The Mamba mixer: selective state space model with conv and gate (arXiv 2312.00752, figure 3).

Legend: b batch, t time, d d_model, e d_inner, n d_state, r dt_rank, k conv width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.config import ModelConfig
from mamba_jax.errors import UserError
from mamba_jax.modules.layout import Documents
from mamba_jax.ops.causal_conv1d import causal_conv1d
from mamba_jax.ops.dot_by_rows import dot_by_rows
from mamba_jax.ops.selective_scan import choose, selective_scan, unsupported

# The paper's range of Δ at the start (section 3.6): log-uniform, never below the floor.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def uniform_fan_in(fan_in: int, gain: float = 1.0) -> jax.nn.initializers.Initializer:
    """U(-gain/√fan_in, gain/√fan_in), the reference implementation's (PyTorch's) default."""
    bound = gain * fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def inverse_softplus_dt(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Biases whose softplus is log-uniform in [DT_MIN, DT_MAX] (the paper, section 3.6)."""
    low, high = jnp.log(DT_MIN), jnp.log(DT_MAX)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype) * (high - low) + low)
    dt = jnp.maximum(dt, DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


class CausalConv1d(nnx.Module):
    """The parameters of a depthwise causal conv: kernel (k, e), bias (e)."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        init = uniform_fan_in(width)
        self.kernel = nnx.Param(init(rngs.params(), (width, channels), jnp.float32))
        self.bias = nnx.Param(init(rngs.params(), (channels,), jnp.float32))


class DtProjection(nnx.Module):
    """The low-rank projection to Δ: kernel (r, e), and bias (e) inside the softplus."""

    def __init__(self, rank: int, channels: int, *, rngs: nnx.Rngs):
        kernel = uniform_fan_in(rank)(rngs.params(), (rank, channels), jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(inverse_softplus_dt(rngs.params(), (channels,)))


def resolve_scan(config: ModelConfig, dtype: jnp.dtype) -> str:
    """Returns the implementation that this machine scans with, before anything is compiled.

    Args:
      config: its ``scan`` is "auto" or a name.
      dtype: of matmuls, and hence of the scan's x.

    Raises:
      UserError: if the name cannot run on this machine or with this shape, or a file that the
        choice depends on is damaged.
    """
    where = (jax.default_backend(), dtype, config.d_inner, config.d_state)
    try:
        if config.scan == "auto":
            return choose(*where)
        reason = unsupported(config.scan, *where)
    except ValueError as error:
        raise UserError(str(error)) from error
    if reason:
        raise UserError(
            f'model.scan="{config.scan}" cannot be used: {reason}; '
            "use auto (train: --config.model.scan=auto, generate: --scan=auto)"
        )
    return config.scan


class MambaMixer(nnx.Module):
    """``out_proj(silu(z) ⊙ SSM(silu(conv(x))))`` with ``x, z = in_proj(u)``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        d, e, n = config.d_model, config.d_inner, config.d_state
        r = config.resolved_dt_rank
        self.splits = (r, r + n)
        self.scan, self.eigenvalues = config.scan, config.eigenvalues
        self.dtype = dtype
        # x and z on an axis of their own: their split never cuts a sharded axis.
        self.in_proj = nnx.LinearGeneral(
            d,
            (2, e),
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=uniform_fan_in(d),
            rngs=rngs,
        )
        self.conv1d = CausalConv1d(e, config.d_conv, rngs=rngs)
        self.x_proj = nnx.Linear(
            e,
            r + 2 * n,
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=uniform_fan_in(e),
            rngs=rngs,
        )
        self.dt_proj = DtProjection(r, e, rngs=rngs)
        self.A_log = nnx.Param(
            jnp.log(jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.float32), (e, n)))
        )
        self.D = nnx.Param(jnp.ones(e, jnp.float32))
        # Scaled by depth, as each layer adds one residual (GPT-2's rule, kept by the reference).
        out_init = uniform_fan_in(e, config.n_layers**-0.5)
        self.out_proj = nnx.Linear(
            e,
            d,
            use_bias=False,
            dtype=dtype,
            dot_general=dot_by_rows,
            kernel_init=out_init,
            rngs=rngs,
        )

    def __call__(
        self, u_btd: jax.Array, where: Documents, cache: dict[str, jax.Array] | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mixes along time.

        Args:
          u_btd: normed inputs, in the matmul dtype.
          where: the documents of the row.
          cache: ``conv_state`` (b, k - 1, e) and ``ssm_state`` (b, e, n) float32 before the row.

        Returns:
          (b, t, d) outputs in the matmul dtype, and the cache after the row.
        """
        cache = cache or {}
        x_bte, z_bte, conv_state = self._convolve(u_btd, where, cache.get("conv_state"))
        dt_bte, B_btn, C_btn = self._select(x_bte)
        y_bte, ssm_state = selective_scan(
            x_bte,
            dt_bte,
            -jnp.exp(self.A_log[...]),
            B_btn,
            C_btn,
            self.D[...],
            z_bte=z_bte,
            dt_bias_e=self.dt_proj.bias[...],
            dt_softplus=True,
            initial_state_ben=cache.get("ssm_state"),
            reset_bt=where.reset_bt,
            eigenvalues=self.eigenvalues,
            implementation=self.scan,
        )
        return self.out_proj(y_bte), {"conv_state": conv_state, "ssm_state": ssm_state}

    def step_sizes(self, u_btd: jax.Array, where: Documents) -> jax.Array:
        """Returns Δ, (b, t, e) float32 > 0, as the scan uses it on a row with nothing before it."""
        x_bte, _, _ = self._convolve(u_btd, where, None)
        dt_bte, _, _ = self._select(x_bte)
        return jax.nn.softplus(dt_bte + self.dt_proj.bias[...])

    def _convolve(
        self, u_btd: jax.Array, where: Documents, conv_state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns x and z, (b, t, e), and the conv's state after the row."""
        # Split, not indexed: the gradients of indices would be padded and added.
        x_bte, z_bte = (v.squeeze(-2) for v in jnp.split(self.in_proj(u_btd), 2, axis=-2))
        x_bte, conv_state = causal_conv1d(
            x_bte,
            self.conv1d.kernel[...],
            self.conv1d.bias[...],
            initial_state_bje=conv_state,
            position_bt=where.position_bt,
        )
        return jax.nn.silu(x_bte), z_bte, conv_state

    def _select(self, x_bte: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns Δ before bias and softplus (b, t, e) float32, and B and C (b, t, n)."""
        dt_btr, B_btn, C_btn = jnp.split(self.x_proj(x_bte), self.splits, axis=-1)
        kernel_re = self.dt_proj.kernel[...].astype(self.dtype)
        dt_bte = dot_by_rows(dt_btr, kernel_re, preferred_element_type=jnp.float32)
        return dt_bte, B_btn, C_btn
