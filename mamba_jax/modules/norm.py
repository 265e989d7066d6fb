"""Root-mean-square norm (arXiv 1910.07467, equation 4)."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_normalise(x: jax.Array, eps: float) -> jax.Array:
    """Divides the last axis by its root mean square, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """RMS norm with a learned scale, computed in float32 whatever the input."""

    def __init__(self, size: int, eps: float, *, init: float = 1.0):
        self.scale = nnx.Param(jnp.full(size, init, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis; returns float32."""
        return rms_normalise(x, self.eps) * self.scale[...]
