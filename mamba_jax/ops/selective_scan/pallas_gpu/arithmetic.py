"""The arithmetic of the kernels: float32, one machine instruction where there is one.

Plain ``jnp.exp2`` and division compile to longer forms that keep subnormal numbers, and the Triton
backend contracts no a·b + c. So they use inline assembly; interpret mode, which has none, computes
the same with ``jnp``. Nothing here depends on a kernel's inputs and outputs: another backend needs
another ``Math``.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# log(1 + e) = s·p(s²) with s = e / (2 + e): the fit to 2·atanh(s) / s at the Chebyshev points of
# s² in [0, 1/9], all that e in [0, 1] needs. It errs by 4e-9, a fifteenth of a float32's rounding.
LOG1P_COEFFICIENTS = (2.00000001, 0.66666316, 0.40024852, 0.27961426, 0.28174666)


@dataclasses.dataclass(frozen=True)
class Math:
    """The functions; ``interpret`` chooses the form without assembly."""

    interpret: bool

    def exp2(self, v: jax.Array) -> jax.Array:
        """2^v, to 2 units in the last place; a result below 2^-126 is 0."""
        return jnp.exp2(v) if self.interpret else _assembly("ex2.approx.ftz.f32 $0, $1;", v)

    def reciprocal(self, v: jax.Array) -> jax.Array:
        """1 / v, to 1 unit in the last place; 0 for infinity."""
        return 1.0 / v if self.interpret else _assembly("rcp.approx.ftz.f32 $0, $1;", v)

    def fma(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """a·b + c, the arguments broadcast to one shape."""
        if self.interpret:
            return a * b + c
        shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
        return _assembly(
            "fma.rn.ftz.f32 $0, $1, $2, $3;", *(jnp.broadcast_to(v, shape) for v in (a, b, c))
        )

    def softplus(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (log(1 + e^v), e^-|v|); the latter is what ``sigmoid`` makes the slope of.

        As max(v, 0) + log(1 + e^-|v|): nothing overflows, and a tiny result keeps all its digits,
        which log2(1 + e), rounded to near 1 first, would lose.
        """
        e = self.exp2(jnp.abs(v) * -LOG2_E)
        s = e * self.reciprocal(2.0 + e)
        q = s * s
        p = jnp.full_like(q, LOG1P_COEFFICIENTS[-1])
        for coefficient in reversed(LOG1P_COEFFICIENTS[:-1]):
            p = self.fma(p, q, jnp.full_like(q, coefficient))
        return self.fma(s, p, jnp.maximum(v, 0.0)), e

    def softplus_slope(self, v: jax.Array, e: jax.Array) -> jax.Array:
        """The derivative of softplus at v, given e = e^-|v|."""
        return jnp.where(v < 0.0, e, 1.0) * self.reciprocal(1.0 + e)

    def sigmoid(self, v: jax.Array) -> jax.Array:
        """1 / (1 + e^-v), for which e^-v may be infinite."""
        return self.reciprocal(1.0 + self.exp2(v * -LOG2_E))


def _assembly(instruction: str, *arguments: jax.Array) -> jax.Array:
    """Applies a float32 instruction to each element."""
    [result] = plt.elementwise_inline_asm(
        instruction,
        args=arguments,
        constraints=",".join(["=f", *["f"] * len(arguments)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)],
    )
    return result
