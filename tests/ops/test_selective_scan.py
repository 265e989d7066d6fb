"""Every implementation of the selective scan against the sequential reference, gradients included.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import contextlib
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mamba_jax.config import ModelConfig, for_inference, presets
from mamba_jax.errors import UserError
from mamba_jax.ops.selective_scan import (
    IMPLEMENTATIONS,
    choose,
    selective_scan,
    unsupported,
)

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]

# Largest error allowed, as a share of the largest value of the array.
TOLERANCES = {
    # Sums of at most 77 tokens × 16 states in another order, each term rounded to 2^-24 = 6e-8.
    "float32": 1e-5,
    # Computed in float32 and rounded once at the end: two sides that differ by 1e-7 may round to
    # neighbours, which lie 2^-7 of the value apart at most.
    "bfloat16": 2**-7,
}


@dataclasses.dataclass(frozen=True)
class Case:
    t: int
    n: int = 8
    dtype: str = "float32"
    initial: bool = False  # an initial state
    resets: tuple[int, ...] | None = None  # first tokens of documents; row 1 has only the first one
    extras: bool = False  # D, dt_bias and the softplus
    gate: bool = False  # z
    eigenvalues: str = "positive"
    b: int = 2
    e: int = 6

    def __str__(self):
        flags = [name for name in ("initial", "extras", "gate") if getattr(self, name)]
        resets = [] if self.resets is None else ["resets" + "_".join(map(str, self.resets))]
        signed = ["signed"] * (self.eigenvalues == "signed")
        return "-".join([f"t{self.t}", f"n{self.n}", self.dtype, *flags, *resets, *signed])


LONG = Case(t=77, n=8, initial=True, resets=(0, 1, 26, 39, 51, 52, 76), extras=True, gate=True)
LONG_SIGNED = dataclasses.replace(LONG, eigenvalues="signed")
SHORT_SIGNED = Case(t=33, n=5, dtype="bfloat16", initial=True, extras=True, eigenvalues="signed")
CASES = [
    Case(t=1, n=16, initial=True, extras=True, gate=True),
    Case(t=1, n=5, dtype="bfloat16", initial=True, resets=(0,), extras=True),
    Case(t=2, n=5, initial=True, resets=(1,), gate=True),
    Case(t=31, n=16, dtype="bfloat16", extras=True, gate=True),
    Case(t=31, n=5, resets=(0, 7, 8, 9, 30), initial=True, extras=True),
    Case(t=33, n=8, initial=True, extras=True, gate=True),
    # Chunks of 33 tokens are 17 + 16 for "sequential", 33 for "chunked".
    Case(t=33, n=32, initial=True, resets=(16, 17, 18)),
    Case(t=64, n=5, dtype="bfloat16", initial=True, resets=(0, 31, 32, 63), gate=True),
    # Chunks are 26 + 26 + 25 and 39 + 38.
    Case(t=77, n=16),
    LONG,
    LONG_SIGNED,
    SHORT_SIGNED,
]
# Kernels run slowly as plain JAX, and those for GPUs know fewer shapes.
LEFT_OUT = [Case(t=77, n=16), LONG_SIGNED]
TPU_CASES = [case for case in CASES if case.t != 31 and case not in LEFT_OUT]
GPU_CASES = [
    dataclasses.replace(case, e=48 if case.t == 64 else 16, n=8 if case.n == 5 else case.n)
    for case in TPU_CASES
]
PAIRS = [
    pytest.param(case, name, id=f"{name}-{case}")
    for name in FAST
    for case in {"pallas_gpu": GPU_CASES, "pallas_tpu": TPU_CASES}.get(name, CASES)
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
pairs = pytest.mark.parametrize(("case", "implementation"), PAIRS)
fast = pytest.mark.parametrize("implementation", FAST)
every = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))


def make_arguments(case, seed=0):
    """Returns the arguments of ``selective_scan``, without the resets and the switches."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    b, t, e, n = case.b, case.t, case.e, case.n
    narrow = lambda v: v.astype(case.dtype)
    dt_bte = draw(b, t, e) - 2.0
    arguments = {
        "x_bte": narrow(draw(b, t, e)),
        "dt_bte": narrow(dt_bte if case.extras else jnp.exp(dt_bte)),
        "A_en": -jnp.exp(draw(e, n)),
        "B_btn": narrow(draw(b, t, n)),
        "C_btn": narrow(draw(b, t, n)),
    }
    if case.extras:
        arguments |= {"D_e": draw(e), "dt_bias_e": draw(e)}
    if case.gate:
        arguments["z_bte"] = narrow(draw(b, t, e))
    if case.initial:
        arguments["initial_state_ben"] = draw(b, e, n)
    return arguments


def make_reset(case):
    if case.resets is None:
        return None
    reset_bt = np.zeros((case.b, case.t), bool)
    reset_bt[0, list(case.resets)] = True
    reset_bt[1:, case.resets[0]] = True
    return reset_bt


def make_weights(case):
    """Weights of y and of the final state in a scalar that depends on all of both.

    They are multiples of 1/8, which bfloat16 represents: the cotangent of y is not rounded.
    """
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.integers(-16, 17, shape) / 8
    return draw(case.b, case.t, case.e), draw(case.b, case.e, case.n)


@functools.partial(jax.jit, static_argnames=("softplus", "implementation", "eigenvalues"))
def run(arguments, reset_bt, weights, softplus, implementation, eigenvalues="positive"):
    """Returns (y, final state) and the gradients by every argument."""

    def scalar(arguments):
        y_bte, state_ben = selective_scan(
            **arguments,
            dt_softplus=softplus,
            reset_bt=reset_bt,
            implementation=implementation,
            eigenvalues=eigenvalues,
            interpret=True,
        )
        wide = jnp.promote_types(y_bte.dtype, jnp.float32)
        w_y, w_state = (w.astype(wide) for w in weights)
        return (w_y * y_bte).sum() + (w_state * state_ben).sum(), (y_bte, state_ben)

    (_, values), gradients = jax.value_and_grad(scalar, has_aux=True)(arguments)
    return values, gradients


def run_case(case, implementation, arguments=None):
    arguments = arguments or make_arguments(case)
    reset_bt = make_reset(case)
    reset_bt = None if reset_bt is None else jnp.asarray(reset_bt)
    weights = tuple(map(jnp.asarray, make_weights(case)))
    return run(arguments, reset_bt, weights, case.extras, implementation, case.eigenvalues)


reference_results = functools.cache(functools.partial(run_case, implementation="reference"))


def numpy_scan(
    x_bte,
    dt_bte,
    A_en,
    B_btn,
    C_btn,
    D_e=0.0,
    z_bte=None,
    dt_bias_e=0.0,
    initial_state_ben=0.0,
    softplus=False,
    reset_bt=None,
    eigenvalues="positive",
):
    """The definition, in float64 or complex128: a loop over tokens and nothing else."""
    h_ben = np.zeros((x_bte.shape[0], *A_en.shape), A_en.dtype) + initial_state_ben
    step_bte = dt_bte + dt_bias_e
    if softplus:
        step_bte = np.log(1 + np.exp(step_bte))
    y_bte = np.zeros_like(x_bte)
    for t in range(x_bte.shape[1]):
        if reset_bt is not None:
            h_ben = np.where(reset_bt[:, t, None, None], 0, h_ben)
        u_be = step_bte[:, t] * x_bte[:, t]
        decay_ben = np.exp(step_bte[:, t, :, None] * A_en)
        if eigenvalues == "signed":
            decay_ben = 2 * decay_ben - 1
        h_ben = decay_ben * h_ben + u_be[..., None] * B_btn[:, t, None]
        y_bte[:, t] = (h_ben * C_btn[:, t, None]).sum(-1) + D_e * x_bte[:, t]
    if z_bte is not None:
        y_bte = y_bte * z_bte / (1 + np.exp(-z_bte))
    return y_bte, h_ben


def numpy_slope(arguments, directions, weights, **switches):
    """The derivative of the weighted sum along a direction, exact to 1e-15 by a complex step."""
    step = 1e-30
    moved = {
        k: v + 1j * step * directions[k] if k in directions else v + 0j
        for k, v in arguments.items()
    }
    y_bte, h_ben = numpy_scan(**moved, **switches)
    return ((weights[0] * y_bte).sum() + (weights[1] * h_ben).sum()).imag / step


def as_float64(tree):
    return jax.tree.map(lambda v: np.asarray(v).astype(np.float64), tree)


def assert_close(actual, expected, tolerance):
    for path, want in jax.tree.leaves_with_path(expected):
        got = functools.reduce(
            lambda node, key: node[getattr(key, "key", getattr(key, "idx", 0))], path, actual
        )
        got, want = as_float64(got), as_float64(want)
        assert np.isfinite(got).all(), path
        error = np.abs(got - want).max() / (np.abs(want).max() + 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.2e}"


@cases
def test_reference_is_the_definition(case):
    arguments, weights, reset_bt = make_arguments(case), make_weights(case), make_reset(case)
    (y_bte, state_ben), gradients = reference_results(case)
    assert y_bte.dtype == case.dtype and state_ben.dtype == jnp.float32
    assert {k: v.dtype for k, v in gradients.items()} == {k: v.dtype for k, v in arguments.items()}
    wide = as_float64(arguments)
    switches = {"softplus": case.extras, "reset_bt": reset_bt, "eigenvalues": case.eigenvalues}
    y_true, state_true = numpy_scan(**wide, **switches)
    assert_close(y_bte, y_true, TOLERANCES[case.dtype])
    assert_close(state_ben, state_true, TOLERANCES["float32"])
    rng = np.random.default_rng(2)
    for name, gradient in as_float64(gradients).items():
        direction = rng.normal(size=gradient.shape)
        slope = numpy_slope(wide, {name: direction}, weights, **switches)
        # The error of a sum of products is measured by the sum of their sizes.
        scale = np.abs(gradient * direction).sum() + 1e-30
        error = abs((gradient * direction).sum() - slope) / scale
        assert error <= TOLERANCES[arguments[name].dtype.name], (name, error)


@pairs
def test_implementations_equal_the_reference(case, implementation):
    values, gradients = run_case(case, implementation)
    true_values, true_gradients = reference_results(case)
    assert {k: v.dtype for k, v in gradients.items()} == {
        k: v.dtype for k, v in true_gradients.items()
    }
    assert_close(values[0], true_values[0], TOLERANCES[case.dtype])
    assert_close(values[1], true_values[1], TOLERANCES["float32"])
    for name, gradient in gradients.items():
        assert_close(gradient, true_gradients[name], TOLERANCES[gradient.dtype.name])


def test_reference_works_in_float64():
    case = Case(t=9, initial=True, extras=True, gate=True)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(v) for k, v in as_float64(make_arguments(case)).items()}
        values, _ = run_case(case, "reference", wide)
        # Float64 rounds to 1.1e-16; a hidden float32 would show as 6e-8.
        assert_close(list(values), list(numpy_scan(**as_float64(wide), softplus=True)), 1e-14)


@fast
def test_packed_documents_equal_separate_ones(implementation):
    """Values and gradients; the initial state, which belongs to no document, gets none."""
    lengths = (38, 1, 38)  # no edge of a chunk lies between two documents
    case = Case(t=sum(lengths), initial=True, extras=True, gate=True, b=1, e=16)
    starts = np.cumsum((0, *lengths[:-1]))
    arguments, (w_y, w_state) = make_arguments(case), make_weights(case)
    reset_bt = jnp.zeros((1, case.t), bool).at[0, starts].set(True)
    values, gradients = run(arguments, reset_bt, (w_y, w_state), True, implementation)
    gradients = as_float64(gradients)
    assert (gradients.pop("initial_state_ben") == 0).all()
    del arguments["initial_state_ben"]

    totals = {k: np.zeros_like(v) for k, v in gradients.items()}
    for start, length in zip(starts, lengths, strict=True):
        document = np.s_[:, start : start + length]
        last = start + length == case.t
        inputs = {k: v[document] if v.shape[:2] == (1, case.t) else v for k, v in arguments.items()}
        (y_bte, state_ben), one = run(
            inputs, None, (w_y[document], w_state * last), True, "reference"
        )
        assert_close(values[0][document], y_bte, TOLERANCES["float32"])
        if last:
            assert_close(values[1], state_ben, TOLERANCES["float32"])
        for name, gradient in as_float64(one).items():
            whole = totals[name].shape[:2] == (1, case.t)
            totals[name][document if whole else ...] += gradient
    assert_close(gradients, totals, TOLERANCES["float32"])


@fast
def test_pieces_and_single_steps_equal_the_whole(implementation):
    case = Case(t=77, n=16, extras=True, gate=True, e=16)
    arguments = make_arguments(case)
    reset_bt = jnp.zeros((2, case.t), bool).at[:, jnp.array([33, 70])].set(True)
    switches = {"dt_softplus": True, "implementation": implementation, "interpret": True}
    scan = jax.jit(functools.partial(selective_scan, **switches))
    y_whole, state_whole = scan(**arguments, reset_bt=reset_bt)
    state_ben, pieces, start = None, [], 0
    for length in (32, 32, *[1] * 13):
        piece = np.s_[:, start : start + length]
        inputs = {k: v[piece] if v.ndim == 3 else v for k, v in arguments.items()}
        y_bte, state_ben = scan(**inputs, initial_state_ben=state_ben, reset_bt=reset_bt[piece])
        pieces.append(y_bte)
        start += length
    assert_close(jnp.concatenate(pieces, axis=1), y_whole, TOLERANCES["float32"])
    assert_close(state_ben, state_whole, TOLERANCES["float32"])


def test_one_token_is_one_plain_step():
    """The same program whatever the implementation: no loop, hardly more than the token's state."""
    arguments = make_arguments(Case(t=1, n=16, initial=True, extras=True, gate=True))
    programs = set()
    for implementation in IMPLEMENTATIONS:
        scan = functools.partial(selective_scan, dt_softplus=True, implementation=implementation)
        lowered = jax.jit(scan).lower(**arguments)
        programs.add(lowered.as_text())
    assert len(programs) == 1
    compiled = lowered.compile()
    assert "while(" not in compiled.as_text()
    state_bytes = arguments["initial_state_ben"].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * state_bytes


@pytest.mark.parametrize(
    ("implementation", "t"),
    [
        *((name, 4_100) for name in FAST),
        *(
            # As plain JAX the GPU kernels take 10 s for 16,400 tokens, but 275 s for 65,536.
            pytest.param(
                name,
                16_400 if name == "pallas_gpu" else 65_536,
                marks=[pytest.mark.slow, pytest.mark.exhaustive],
            )
            for name in IMPLEMENTATIONS
        ),
    ],
)
def test_long_sequence_of_extreme_steps(implementation, t):
    """Δ from 1e-6 (which all but keeps the state) to 50 (which replaces it)."""
    case, arguments, directions, true_values, slopes = extreme_truth(t)
    values, gradients = run_case(case, implementation, arguments)
    # A decay near 1 is rounded by up to 2^-25, the same way at every step where Δ is constant: a
    # state may be off by t × 2^-25 of its size: 1.2e-4 at 4,100 tokens, 2e-3 at 65,536.
    tolerance = t * 2**-25
    assert_close(list(values), list(true_values), tolerance)
    for name, gradient in as_float64(gradients).items():
        assert np.isfinite(gradient).all(), name
        product = gradient * directions[name]
        assert abs(product.sum() - slopes[name]) <= tolerance * np.abs(product).sum(), name


@functools.cache
def extreme_truth(t):
    """Returns a case, its arguments, and by float64 loops its values and its slope by each."""
    case = Case(t=t, initial=True, b=1, e=16)
    arguments = make_arguments(case)
    rng = np.random.default_rng(3)
    dt_bte = np.exp(rng.uniform(np.log(1e-6), np.log(1e-4), (1, case.t, case.e)))
    dt_bte[:, 3000:3003] = 50.0
    dt_bte[:, :, 1] = 1e-6
    dt_bte[:, :, 2] = 50.0
    arguments["dt_bte"] = jnp.asarray(dt_bte, jnp.float32)
    wide, weights = as_float64(arguments), make_weights(case)
    directions = {k: rng.normal(size=v.shape) for k, v in wide.items()}
    slopes = {k: numpy_slope(wide, {k: directions[k]}, weights) for k in wide}
    return case, arguments, directions, numpy_scan(**wide), slopes


@fast
def test_same_inputs_twice_give_the_same_bits(implementation):
    case = dataclasses.replace(LONG, e=16)
    first, second = (jax.tree.map(np.asarray, run_case(case, implementation)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("implementation", ["sequential", "chunked"])
def test_gradient_memory_is_linear_and_without_the_states(implementation):
    """O(B·L·D): a token and channel costs a few floats, far fewer than its n = 32 states."""
    n, e = 32, 64

    def temporary_bytes(t):
        arguments = jax.eval_shape(lambda: make_arguments(Case(t=t, n=n, b=1, e=e)))

        def scalar(arguments):
            y_bte, state_ben = selective_scan(**arguments, implementation=implementation)
            return (y_bte**2).sum() + state_ben.sum()

        compiled = jax.jit(jax.grad(scalar)).lower(arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = 2048, 8192
    few, many = temporary_bytes(short), temporary_bytes(long)
    floats = (many - few) / (4 * (long - short) * e)
    # Measured: 6.5 ("chunked") and 8 ("sequential"), of which n / chunk length (0.5 and 1) are the
    # states at chunk starts. The part that does not grow is one chunk's states, several times.
    assert floats < 10
    assert many <= few * long / short, "faster than linear"
    assert many < 0.6 * (4 * long * e * n)


@pytest.mark.parametrize(
    ("platform", "dtype", "d_inner", "d_state", "name"),
    [
        ("cpu", "float32", 1536, 16, "sequential"),
        ("gpu", "bfloat16", 1536, 16, "pallas_gpu"),
        ("gpu", "float32", 1216, 8, "pallas_gpu"),
        ("gpu", "bfloat16", 1536, 5, "chunked"),
        ("gpu", "bfloat16", 100, 16, "chunked"),
        ("gpu", "float16", 1536, 16, "chunked"),
        ("tpu", "bfloat16", 1536, 16, "chunked"),
    ],
)
def test_auto_by_platform_and_shape(platform, dtype, d_inner, d_state, name, monkeypatch):
    assert choose(platform, dtype, d_inner, d_state) == name
    called = []
    module = importlib.import_module(f"mamba_jax.ops.selective_scan.{name}")
    real = module.scan
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(module, "scan", lambda *a, **k: called.append(name) or real(*a, **k))
    arguments = make_arguments(Case(t=3, b=1, e=d_inner, n=d_state, dtype=dtype))
    jax.eval_shape(functools.partial(selective_scan, interpret=True), **arguments)
    assert called == [name]


def test_auto_is_logged_once_for_each_choice(caplog):
    arguments = make_arguments(Case(t=3, e=7))
    with caplog.at_level("INFO", "mamba_jax"):
        for _ in range(2):
            selective_scan(**arguments)
            selective_scan(**arguments, implementation="chunked")  # a named one is not logged
    said = [record.getMessage() for record in caplog.records if record.name == "mamba_jax"]
    assert said == ["selective scan: sequential (cpu, float32, d_inner 7, d_state 8)"]


def test_every_name_is_a_different_program():
    arguments = make_arguments(Case(t=65, e=16))
    programs = set()
    for name in IMPLEMENTATIONS:
        scan = functools.partial(selective_scan, implementation=name, interpret=True)
        programs.add(jax.jit(scan).lower(**arguments).as_text())
    assert len(programs) == len(IMPLEMENTATIONS)


@pytest.mark.parametrize(("name", "platform"), [("pallas_gpu", "cuda"), ("pallas_tpu", "tpu")])
def test_kernels_lower_for_their_platform_and_only_there(name, platform):
    """A small program with a kernel's call in it, made on a machine without the device."""
    case = Case(t=70, e=1216, n=16, dtype="bfloat16", initial=True, extras=True, gate=True)
    arguments = jax.eval_shape(lambda: make_arguments(case))
    scan = functools.partial(selective_scan, dt_softplus=True, implementation=name)
    gradient = jax.grad(lambda arguments: scan(**arguments)[0].astype(jnp.float32).sum())
    # jax calls Triton's custom call unstable: the program is looked at, not kept.
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    for function in (lambda arguments: scan(**arguments), gradient):
        export = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
        with device_of(platform):
            text = export(arguments).mlir_module()
        assert {"cuda": "triton", "tpu": "tpu_custom_call"}[platform] in text
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(scan).lower(**arguments)
    assert unsupported(name, "gpu" if platform == "cuda" else "tpu", "bfloat16", 1216, 16) is None
    assert f"{name} scan runs on a" in unsupported(name, "cpu", "bfloat16", 1216, 16)


def device_of(platform):
    """From jax 0.11 on, Pallas wants to know which GPU it lowers for."""
    if platform == "tpu" or not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_config_knows_every_name():
    for name in ("auto", *IMPLEMENTATIONS):
        assert for_inference(ModelConfig(), scan=name).scan == name
    with pytest.raises(UserError, match=f"auto, {', '.join(IMPLEMENTATIONS)}"):
        for_inference(ModelConfig(), scan="pallas")


@pytest.mark.parametrize("size", presets.SIZES)
def test_the_kernels_take_every_size(size):
    d_inner = 2 * presets.SIZES[size].d_model
    assert unsupported("pallas_gpu", "gpu", "bfloat16", d_inner, 16) is None
    assert unsupported("pallas_tpu", "tpu", "bfloat16", d_inner, 16) is None


def test_shapes_that_a_kernel_cannot_take_are_named():
    for name, case, message in (
        ("pallas_gpu", Case(t=3, n=5, e=16), "d_state of 8, 16, 32, not 5"),
        ("pallas_gpu", Case(t=3, n=8, e=20), "divisible by 16, not 20"),
        ("pallas_gpu", Case(t=3, n=8, e=16, dtype="float16"), "not float16"),
        ("pallas_tpu", Case(t=3, n=33), "up to 32, not 33"),
        ("pallas_tpu", Case(t=3, dtype="float16"), "not float16"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan(**make_arguments(case), implementation=name, interpret=True)


def test_wrong_arguments_are_named():
    arguments = make_arguments(Case(t=3))
    with pytest.raises(ValueError, match=r'"paralel".*auto, reference, sequential'):
        selective_scan(**arguments, implementation="paralel")
    with pytest.raises(ValueError, match=r'"negative".*positive, signed'):
        selective_scan(**arguments, eigenvalues="negative")
    with pytest.raises(TypeCheckError, match="B_btn"):
        selective_scan(**arguments | {"B_btn": arguments["B_btn"][:, :2]})
    with pytest.raises(ValueError, match="at least one token"):
        selective_scan(**{k: v[:, :0] if v.ndim == 3 else v for k, v in arguments.items()})
