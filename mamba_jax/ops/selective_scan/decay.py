"""The decay a of a state, an eigenvalue of the recurrence: one definition for every implementation.

With p = exp(Δ A) in (0, 1):
  positive: a = p in (0, 1) (arXiv 2312.00752): a state fades.
  signed: a = 2 p − 1 in (−1, 1) (arXiv 2411.12537, section 4): it may alternate too, as parity
    needs. Several tokens decay by the product of their a, which is not a function of ΣΔ.
"""

import jax

EIGENVALUES = ("positive", "signed")


def decay(power: jax.Array, signed: bool, reset: jax.Array | None = None) -> jax.Array:
    """Returns a.

    Args:
      power: p, 0 at a reset.
      signed: which of the two.
      reset: True at a reset, where a is 0; None: no resets.
    """
    return 2.0 * power - _one(power, reset) if signed else power


def adjoint(
    g: jax.Array, power: jax.Array, signed: bool, reset: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns g a and g a', with a' the slope of a by the exponent Δ A; the others as above.

    Neither comes from the other, nor from a, which near −1 has lost the digits of p.
    """
    if not signed:
        product = g * power
        return product, product
    by_exponent = 2.0 * power * g
    return by_exponent - g * _one(power, reset), by_exponent


def _one(power: jax.Array, reset: jax.Array | None) -> jax.Array | float:
    return 1.0 if reset is None else 1.0 - reset.astype(power.dtype)
