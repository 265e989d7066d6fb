"""What only a GPU can show: the kernels' real arithmetic, and a step made of them.

``TEST_PLATFORM=cuda pytest -m gpu``. Shapes: b batch, t time, e d_inner, n d_state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import ModelConfig
from mamba_jax.ops.selective_scan import choose, selective_scan
from mamba_jax.training.state import init_state
from mamba_jax.training.step import make_train_step
from tests.support.tiny_run import EOT, one_device, run_config, windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here"),
]

# Largest error allowed, as a share of the largest value of the array.
TOLERANCES = {
    # Sums over 300 tokens in another order, of terms that ex2.approx rounds to 2 units (2^-22).
    "float32": 3e-5,
    # The same, rounded once at the end: neighbours lie 2^-7 of the value apart at most.
    "bfloat16": 2**-7,
}


def make_arguments(b, t, e, n, dtype, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    narrow = lambda *shape: draw(*shape).astype(dtype)
    return {
        "x_bte": narrow(b, t, e),
        "dt_bte": draw(b, t, e) - 2.0,
        "A_en": -jnp.exp(draw(e, n)),
        "B_btn": narrow(b, t, n),
        "C_btn": narrow(b, t, n),
        "D_e": draw(e),
        "z_bte": narrow(b, t, e),
        "dt_bias_e": draw(e),
        "initial_state_ben": draw(b, e, n),
    }


@functools.partial(jax.jit, static_argnames=("implementation", "eigenvalues"))
def values_and_gradients(arguments, reset_bt, implementation, eigenvalues="positive"):
    switches = {"eigenvalues": eigenvalues, "implementation": implementation}

    def weighted_sum(arguments):
        y_bte, state_ben = selective_scan(
            **arguments, dt_softplus=True, reset_bt=reset_bt, **switches
        )
        wide = jnp.promote_types(y_bte.dtype, jnp.float32)
        # Eighths, which bfloat16 holds exactly: y's cotangent has y's dtype.
        wave = lambda v: ((jnp.arange(v.size) * 7 % 17 - 8) / 8).astype(wide).reshape(v.shape)
        total = (wave(y_bte) * y_bte).sum() + (wave(state_ben) * state_ben).sum()
        return total, {"y": y_bte, "state": state_ben}

    gradients, values = jax.grad(weighted_sum, has_aux=True)(arguments)
    return values | gradients


# A small batch splits the sequence; 304 = 19 × 16 is the odd share of the hybrid's 1,216 channels.
@pytest.mark.parametrize("implementation", ["pallas_gpu", "chunked", "associative"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("b", "t", "e", "n", "resets", "eigenvalues"),
    [
        (2, 300, 304, 16, None, "positive"),
        (1, 1027, 64, 8, (0, 5, 512), "positive"),
        (8, 33, 128, 32, (32,), "positive"),
        (1, 1027, 64, 8, (0, 5, 512), "signed"),
    ],
)
def test_scan_equals_the_reference_in_float64(
    implementation, dtype, b, t, e, n, resets, eigenvalues
):
    arguments = make_arguments(b, t, e, n, dtype)
    reset_bt = None
    if resets is not None:
        reset_bt = jnp.zeros((b, t), bool).at[0, jnp.array(resets)].set(True)
    actual = values_and_gradients(arguments, reset_bt, implementation, eigenvalues)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), arguments)
        expected = values_and_gradients(wide, reset_bt, "reference", eigenvalues)
    for name, want in expected.items():
        got, want = np.asarray(actual[name], np.float64), np.asarray(want)
        error = np.abs(got - want).max() / (np.abs(want).max() + 1e-30)
        assert error <= TOLERANCES[actual[name].dtype.name], (name, error)


def test_kernels_are_deterministic():
    arguments = make_arguments(2, 2048, 1216, 16, "bfloat16")
    first, second = (
        jax.device_get(values_and_gradients(arguments, None, "pallas_gpu")) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_long_and_extreme_sequences_stay_finite_and_right():
    arguments = make_arguments(1, 65_536, 32, 16, "float32")
    dt = np.array([1e-6, 1e-3, 50.0], np.float32)[np.arange(65_536) % 3]
    # softplus⁻¹, exact in float64 for the small ones.
    raw = np.log(np.expm1(dt.astype(np.float64))).astype(np.float32)
    arguments["dt_bte"] = jnp.broadcast_to(raw[None, :, None], (1, 65_536, 32))
    arguments["dt_bias_e"] = jnp.zeros(32)
    actual = values_and_gradients(arguments, None, "pallas_gpu")
    expected = values_and_gradients(arguments, None, "sequential")
    for name, want in expected.items():
        got, want = np.asarray(actual[name]), np.asarray(want)
        assert np.isfinite(got).all(), name
        # Both round; sums over all 65,536 tokens (A, D, bias) differ by their order.
        assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max(), name


def test_training_with_the_kernels_follows_training_without():
    model = ModelConfig(d_model=64, n_layers=2, vocab_size=32, dtype="float32")
    assert choose("gpu", jnp.bfloat16, model.d_inner, model.d_state) == "pallas_gpu"
    losses = {}
    for scan in ("auto", "chunked"):
        config = run_config(dataclasses.replace(model, scan=scan), learning_rate=1e-3)
        state = init_state(config, one_device())
        step = make_train_step(config, one_device(), EOT)
        losses[scan] = []
        for seed in range(10):
            state, metrics = step(state, windows(tokens=100, seed=seed % 2))
            losses[scan].append(float(metrics["loss"]))
    assert losses["auto"][-1] < losses["auto"][0]
    # Float32, but products in TF32 (2^-11), and Adam's first steps magnify what rounding changes.
    np.testing.assert_allclose(losses["auto"], losses["chunked"], rtol=1e-3)
