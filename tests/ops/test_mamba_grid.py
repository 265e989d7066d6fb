"""An independent grid: the shapes, options and tolerances that the public Mamba repository tests
its own kernel with (state-spaces/mamba, tests/ops/test_selective_scan.py), against a float64 loop.

Taken over: 2 rows, 4 channels (16 here for the GPU kernel, whose smallest block they are),
8 states, 128 to 4,096 tokens, the three dtypes of x, Δ, z, B and C, and with them the relative and
absolute tolerances, where the output is concerned; Δ bias, softplus, D, z and the last state always
on; A and Δ uniform, the others normal. There the gradients are printed, and their comparison is
disabled; the tolerances written down for it are applied here: twice the output's for x, five and
ten times (relative, absolute) for Δ, the output's for B, C and z, and for A, D and the bias the
larger of 1e-3 and the output's, for A five times that absolutely.

Options that do not exist here: complex A, B and C fixed in time, and groups of B and C. The two
Pallas kernels take no float16. Added: one cell with signed eigenvalues.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.ops.selective_scan import IMPLEMENTATIONS, selective_scan

TOLERANCES = {"float32": (6e-4, 2e-3), "float16": (3e-3, 5e-3), "bfloat16": (3e-2, 5e-2)}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
MARKS = {128: [], 4096: [pytest.mark.slow]}
CELLS = [
    # Compiling takes the time, whatever the length: the lengths between run only on request.
    pytest.param(name, dtype, t, False, marks=MARKS.get(t, [pytest.mark.exhaustive]))
    for name in IMPLEMENTATIONS
    for dtype in TOLERANCES
    if not (dtype == "float16" and name.startswith("pallas"))
    for t in LENGTHS
]
CELLS.append(pytest.param("pallas_gpu", "float32", 128, True))


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Compiles twice as fast, at the price of slower programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(("implementation", "dtype", "t", "signed"), CELLS)
def test_mamba_grid(implementation, dtype, t, signed):
    arguments, dy_bte = draw(dtype, t, 16 if implementation == "pallas_gpu" else 4)
    narrow = {
        k: jnp.asarray(v, jnp.float32 if k in "A_en D_e dt_bias_e" else dtype)
        for k, v in arguments.items()
    }
    dy_narrow_bte = jnp.asarray(dy_bte, dtype)
    (y_bte, state_ben), gradients = run(narrow, dy_narrow_bte, implementation, signed)
    assert y_bte.dtype == dtype and state_ben.dtype == jnp.float32
    exact = {k: np.asarray(v).astype(np.float64) for k, v in narrow.items()}
    true_y, true_state, true_gradients = loop(**exact, dy_bte=dy_bte, signed=signed)

    rtol, atol = TOLERANCES[dtype]
    rtol_w, atol_w = max(rtol, 1e-3), max(atol, 1e-3)
    close(y_bte, true_y, rtol, atol)
    close(state_ben, true_state, rtol, atol)
    limits = {
        "x_bte": (2 * rtol, 2 * atol),
        "dt_bte": (5 * rtol, 10 * atol),
        "A_en": (rtol_w, 5 * atol_w),
        "D_e": (rtol_w, atol_w),
        "dt_bias_e": (rtol_w, atol_w),
    }
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        close(gradient, true_gradients[name], *limits.get(name, (rtol, atol)), name)


def draw(dtype, t, e, b=2, n=8):
    """Returns the arguments and the gradient of y, all rounded to ``dtype`` where they have it."""
    rng = np.random.default_rng(0)
    arguments = {
        "x_bte": rng.normal(size=(b, t, e)),
        "dt_bte": 0.5 * rng.random((b, t, e)),
        "A_en": -0.5 * rng.random((e, n)),
        "B_btn": rng.normal(size=(b, t, n)),
        "C_btn": rng.normal(size=(b, t, n)),
        "D_e": rng.normal(size=e),
        "z_bte": rng.normal(size=(b, t, e)),
        "dt_bias_e": 0.5 * rng.random(e),
    }
    dy_bte = np.asarray(jnp.asarray(rng.normal(size=(b, t, e)), dtype)).astype(np.float64)
    return arguments, dy_bte


@functools.partial(jax.jit, static_argnames=("implementation", "signed"))
def run(arguments, dy_bte, implementation, signed):
    """Returns (y, last state), and the gradients where the last state is not asked for."""

    switches = {
        "dt_softplus": True,
        "eigenvalues": "signed" if signed else "positive",
        "implementation": implementation,
        "interpret": True,
    }

    def scan(arguments):
        return selective_scan(**arguments, **switches)

    (y_bte, state_ben), pull_back = jax.vjp(scan, arguments)
    return (y_bte, state_ben), pull_back((dy_bte, jnp.zeros_like(state_ben)))[0]


def loop(x_bte, dt_bte, A_en, B_btn, C_btn, D_e, z_bte, dt_bias_e, dy_bte, signed=False):
    """The definition and its adjoint in float64, one token after the other."""
    t = x_bte.shape[1]
    v_bte = dt_bte + dt_bias_e
    step_bte = np.log1p(np.exp(v_bte))
    sigmoid_bte = 1 / (1 + np.exp(-z_bte))
    h_ben = np.zeros((len(x_bte), *A_en.shape))
    h_tben, s_bte = [], D_e * x_bte
    for i in range(t):
        u_be = step_bte[:, i] * x_bte[:, i]
        decay_ben = np.exp(step_bte[:, i, :, None] * A_en)
        decay_ben = 2 * decay_ben - 1 if signed else decay_ben
        h_ben = decay_ben * h_ben + u_be[:, :, None] * B_btn[:, i, None]
        h_tben.append(h_ben)
        s_bte[:, i] += np.einsum("ben,bn->be", h_ben, C_btn[:, i])

    ds_bte = dy_bte * z_bte * sigmoid_bte
    gradients = {
        "z_bte": dy_bte * s_bte * sigmoid_bte * (1 + z_bte * (1 - sigmoid_bte)),
        "D_e": (ds_bte * x_bte).sum((0, 1)),
        "x_bte": ds_bte * D_e,
        "dt_bte": np.zeros_like(x_bte),
        "A_en": np.zeros_like(A_en),
        "B_btn": np.zeros_like(B_btn),
        "C_btn": np.zeros_like(C_btn),
    }
    g_ben = np.zeros_like(h_ben)
    for i in reversed(range(t)):
        x_be, step_be = x_bte[:, i], step_bte[:, i]
        g_ben = g_ben + ds_bte[:, i, :, None] * C_btn[:, i, None]
        gradients["C_btn"][:, i] = np.einsum("ben,be->bn", h_tben[i], ds_bte[:, i])
        gradients["B_btn"][:, i] = np.einsum("ben,be->bn", g_ben, step_be * x_be)
        du_be = np.einsum("ben,bn->be", g_ben, B_btn[:, i])
        gradients["x_bte"][:, i] += du_be * step_be
        power_ben = np.exp(step_be[:, :, None] * A_en)
        decay_ben, slope_ben = power_ben, power_ben
        if signed:
            decay_ben, slope_ben = 2 * power_ben - 1, 2 * power_ben
        q_ben = g_ben * slope_ben * h_tben[i - 1] if i else 0 * g_ben  # of the exponent
        g_ben = g_ben * decay_ben
        gradients["dt_bte"][:, i] = du_be * x_be + (q_ben * A_en).sum(-1)
        gradients["A_en"] += (q_ben * step_be[:, :, None]).sum(0)
    gradients["dt_bte"] /= 1 + np.exp(-v_bte)
    gradients["dt_bias_e"] = gradients["dt_bte"].sum((0, 1))
    return s_bte * z_bte * sigmoid_bte, h_tben[-1], gradients


def close(actual, expected, rtol, atol, name=""):
    actual = np.asarray(actual).astype(np.float64)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("signed", [False, True])
def test_the_adjoint_of_the_loop_is_its_slope(signed):
    """The truth above against differences of its own forward, in a random direction."""
    arguments, dy_bte = draw("float32", 7, 3)
    switches = {"dy_bte": dy_bte, "signed": signed}
    *_, gradients = loop(**arguments, **switches)
    rng, step = np.random.default_rng(1), 1e-6
    direction = {k: rng.normal(size=v.shape) for k, v in arguments.items()}
    value = lambda sign: (
        loop(**{k: v + sign * step * direction[k] for k, v in arguments.items()}, **switches)[0]
        * dy_bte
    ).sum()
    for name in arguments:
        others = {k: 0 * v for k, v in direction.items()} | {
            name: rng.normal(size=arguments[name].shape)
        }
        direction, kept = others, direction
        slope = (value(1) - value(-1)) / (2 * step)
        direction = kept
        # Central differences: rounding 1e-16 / 1e-6, and a third derivative times 1e-12.
        np.testing.assert_allclose(
            (gradients[name] * others[name]).sum(), slope, rtol=1e-6, atol=1e-7
        )
