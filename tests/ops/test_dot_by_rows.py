"""Products on rows: values and gradients of the product on all axes, and one contracted axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.ops.dot_by_rows import dot_by_rows

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "spec"),
    [((2, 5, 3), (3, 4), "btd,de->bte"), ((2, 5, 3), (3, 2, 4), "btd,dme->btme")],
)
def test_values_and_gradients(x_shape, kernel_shape, spec):
    x, kernel = RNG.normal(size=x_shape), RNG.normal(size=kernel_shape)
    y = np.einsum(spec, x, kernel)
    dy = RNG.normal(size=y.shape)
    inputs, result = spec.split("->")
    of_x, of_kernel = inputs.split(",")
    truth = (
        np.einsum(f"{result},{of_kernel}->{of_x}", dy, kernel),
        np.einsum(f"{of_x},{result}->{of_kernel}", x, dy),
    )
    made, pull = jax.vjp(dot_by_rows, jnp.float32(x), jnp.float32(kernel))
    # float32 rounding in sums of at most ten terms of order 1.
    np.testing.assert_allclose(made, y, rtol=0, atol=2e-6)
    for gradient, true in zip(pull(jnp.float32(dy)), truth, strict=True):
        np.testing.assert_allclose(gradient, true, rtol=0, atol=5e-6)


def test_the_kernel_s_gradient_contracts_one_axis():
    """Two axes would be brought together by copies on a CPU."""
    x, kernel = jnp.ones((2, 5, 3)), jnp.ones((3, 4))
    program = jax.make_jaxpr(jax.grad(lambda kernel: dot_by_rows(x, kernel).sum()))(kernel)
    contracted = [
        equation.params["dimension_numbers"][0]
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert contracted and all(len(axes) == 1 for pair in contracted for axes in pair)


def test_another_product_is_refused():
    with pytest.raises(AssertionError):
        dot_by_rows(jnp.ones((2, 3)), jnp.ones((3, 3)), (((0,), (0,)), ((), ())))
