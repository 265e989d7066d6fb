"""The GPU kernels, run as plain JAX: against the definition in float64, values and gradients.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mamba_jax.config import presets
from mamba_jax.ops.selective_scan import pallas_gpu, reference
from mamba_jax.ops.selective_scan.pallas_gpu import tuning
from mamba_jax.ops.selective_scan.pallas_gpu.arithmetic import Math
from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Tile
from mamba_jax.ops.selective_scan.pallas_gpu.time_loop import TimeLoop
from mamba_jax.ops.selective_scan.pallas_gpu.tuning import ScanPlan

# Largest error allowed, as a share of the largest value of the array.
TOLERANCES = {
    # Sums of at most 45 tokens × 32 states in another order, each term rounded to 2^-24 = 6e-8.
    "float32": 3e-6,
    # As above, and rounded once at the end to bfloat16: up to one unit, 2^-8 of the value, where
    # the two sides lie on both sides of a midpoint.
    "bfloat16": 2**-8,
}


def make_plan(segments=(1, 1), chunk=4, groups=(2, 2), block=32):
    tile = functools.partial(Tile, block)
    return ScanPlan(chunk, tile(groups[0]), tile(groups[1]), *segments)


@dataclasses.dataclass(frozen=True)
class Case:
    t: int
    e: int = 32
    n: int = 8
    b: int = 2
    narrow: str = "float32"  # x, z, B and C
    dt: str = "float32"
    options: str = "D z bias softplus"  # and "signed" eigenvalues
    initial: bool = False
    resets: tuple[int, ...] | None = None  # first tokens of documents; row 1 has only the first one
    plan: ScanPlan = make_plan()  # noqa: RUF009 (frozen)

    def __str__(self):
        plan, resets = self.plan, "" if self.resets is None else f"-resets{len(self.resets)}"
        words = [self.narrow, self.dt, self.options.replace(" ", "+"), "initial" * self.initial]
        split = f"s{plan.forward_segments}.{plan.backward_segments}"
        sizes = f"b{self.b}t{self.t}e{self.e}n{self.n}"
        return "-".join(filter(None, [sizes, *words, split])) + resets


CASES = [
    Case(t=1, initial=True),
    Case(t=1, e=16, n=16, narrow="bfloat16", dt="bfloat16", resets=(0,), initial=True),
    Case(t=2, options="", resets=(1,)),
    Case(t=4, n=32, b=1, options="softplus"),  # one whole chunk
    Case(t=9, e=48, n=16, initial=True),  # blocks of 16 channels; a chunk of one token
    Case(t=23, e=64, narrow="bfloat16", initial=True, resets=(0, 7, 8, 9, 22)),
    Case(t=23, n=16, b=3, options="D bias", dt="bfloat16"),
    Case(t=13, options="z", initial=True, plan=make_plan(chunk=8, groups=(3, 5))),
    Case(t=45, n=16, narrow="bfloat16", initial=True, plan=make_plan((3, 2))),
    # Chunks of 4: segments of 16, 16 and 5 tokens forward, of 20 and 17 backward.
    Case(t=37, initial=True, resets=(0, 15, 16, 17, 32, 36), plan=make_plan((3, 2))),
    Case(t=33, n=32, b=1, options="z softplus", resets=(20,), plan=make_plan((4, 5))),
    Case(t=33, options="D z", plan=make_plan((9, 3))),  # the last segment is a single token
    Case(t=16, b=1, initial=True, plan=make_plan((99, 99))),  # more segments than chunks
    Case(t=4, n=32, b=1, options="softplus signed"),
    Case(
        t=37,
        initial=True,
        resets=(0, 15, 16, 33),  # the backward's second segment of two has one
        options="D z bias softplus signed",
        plan=make_plan((3, 2)),
    ),
    Case(t=33, options="signed", narrow="bfloat16", initial=True, plan=make_plan((4, 5))),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Compiles twice as fast, at the price of slower programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_arguments(case, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    b, t, e, n = case.b, case.t, case.e, case.n
    narrow = lambda v: v.astype(case.narrow)
    dt_bte = draw(b, t, e) - 2.0
    arguments = {
        "x_bte": narrow(draw(b, t, e)),
        "dt_bte": (dt_bte if "softplus" in case.options else jnp.exp(dt_bte)).astype(case.dt),
        "A_en": -jnp.exp(draw(e, n)),
        "B_btn": narrow(draw(b, t, n)),
        "C_btn": narrow(draw(b, t, n)),
    }
    if "D" in case.options:
        arguments["D_e"] = draw(e)
    if "z" in case.options:
        arguments["z_bte"] = narrow(draw(b, t, e))
    if "bias" in case.options:
        arguments["dt_bias_e"] = jnp.abs(draw(e))  # positive: Δ stays so without the softplus too
    if case.initial:
        arguments["initial_state_ben"] = draw(b, e, n)
    return arguments


def make_reset(case):
    if case.resets is None:
        return None
    reset_bt = np.zeros((case.b, case.t), bool)
    reset_bt[0, list(case.resets)] = True
    reset_bt[1:, case.resets[0]] = True
    return jnp.asarray(reset_bt)


def make_scalar(scan, case, reset_bt):
    """A scalar that depends on all of y and the final state, with weights bfloat16 represents."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.integers(-16, 17, shape) / 8)
    w_y, w_state = draw(case.b, case.t, case.e), draw(case.b, case.e, case.n)

    def scalar(arguments):
        switches = {
            "dt_softplus": "softplus" in case.options,
            "signed": "signed" in case.options,
        }
        y_bte, state_ben = scan(**arguments, **switches, reset_bt=reset_bt)
        return (w_y * y_bte).sum() + (w_state * state_ben).sum(), (y_bte, state_ben)

    return jax.jit(jax.value_and_grad(scalar, has_aux=True))


def run(case, arguments):
    scan = functools.partial(pallas_gpu.scan, interpret=True, plan=case.plan)
    (_, values), gradients = make_scalar(scan, case, make_reset(case))(arguments)
    return values, gradients


def run_in_float64(case, arguments):
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(v, np.float64)) for name, v in arguments.items()}
        (_, values), gradients = make_scalar(definition, case, make_reset(case))(wide)
        return jax.tree.map(np.asarray, (values, gradients))


def definition(
    x_bte,
    dt_bte,
    A_en,
    B_btn,
    C_btn,
    D_e=0.0,
    z_bte=None,
    dt_bias_e=0.0,
    initial_state_ben=0.0,
    dt_softplus=False,
    signed=False,
    reset_bt=None,
):
    """A scan over tokens and nothing else."""
    step_bte = dt_bte + dt_bias_e
    if dt_softplus:
        step_bte = jnp.logaddexp(step_bte, 0.0)
    h_ben = jnp.zeros((x_bte.shape[0], *A_en.shape), A_en.dtype) + initial_state_ben
    keep_bt = jnp.ones(x_bte.shape[:2]) if reset_bt is None else jnp.where(reset_bt, 0.0, 1.0)

    def token(h_ben, values):
        x_be, step_be, B_bn, C_bn, keep_b = values
        decay_ben = jnp.exp(step_be[:, :, None] * A_en)
        decay_ben = 2 * decay_ben - 1 if signed else decay_ben
        h_ben = decay_ben * h_ben * keep_b[:, None, None]
        h_ben += (step_be * x_be)[:, :, None] * B_bn[:, None, :]
        return h_ben, jnp.einsum("ben,bn->be", h_ben, C_bn) + D_e * x_be

    values = [jnp.moveaxis(v, 1, 0) for v in (x_bte, step_bte, B_btn, C_btn, keep_bt)]
    h_ben, y_tbe = jax.lax.scan(token, h_ben, values)
    y_bte = jnp.moveaxis(y_tbe, 0, 1)
    return y_bte if z_bte is None else y_bte * z_bte / (1 + jnp.exp(-z_bte)), h_ben


def assert_close(ours, truth, name):
    ours_64, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    assert ours_64.shape == truth.shape, name
    error, size = np.abs(ours_64 - truth).max(), np.abs(truth).max()
    assert np.isfinite(ours_64).all() and error <= TOLERANCES[str(ours.dtype)] * size, (
        f"{name}: error {error} of {size}"
    )


@cases
def test_values_and_every_gradient(case):
    arguments = make_arguments(case)
    (y_bte, state_ben), gradients = run(case, arguments)
    (true_y_bte, true_state_ben), true_gradients = run_in_float64(case, arguments)
    assert (y_bte.dtype, state_ben.dtype) == (case.narrow, jnp.float32)
    assert_close(y_bte, true_y_bte, "y")
    assert_close(state_ben, true_state_ben, "final state")
    assert gradients.keys() == arguments.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
        assert_close(gradient, true_gradients[name], name)


def test_inference_equals_training_and_saves_nothing():
    case = Case(t=9, initial=True, resets=(0, 5))
    arguments = make_arguments(case)
    scan = functools.partial(
        pallas_gpu.scan, dt_softplus=True, interpret=True, reset_bt=make_reset(case), plan=case.plan
    )
    alone = jax.jit(lambda arguments: scan(**arguments))(arguments)
    # XLA may fuse the two programs differently: float32 rounding of values up to 5.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, alone, run(case, arguments)[0])
    chunks = -(-case.t // case.plan.chunk_tokens)
    states = f"{case.b},{chunks},{case.e},{case.n}"
    inference = str(jax.make_jaxpr(lambda a: scan(**a))(arguments))
    training = str(jax.make_jaxpr(jax.grad(lambda a: scan(**a)[0].sum()))(arguments))
    assert f"[{states}]" in training and f"[{states}]" not in inference


def test_the_same_inputs_give_the_same_bits():
    case = CASES[3]
    arguments = make_arguments(case)
    first = jax.tree.map(np.asarray, run(case, arguments))
    jax.clear_caches()
    jax.tree.map(np.testing.assert_array_equal, first, run(case, arguments))


@pytest.mark.parametrize("segments", [(1, 1), (2, 3)])
def test_extreme_steps(segments):
    """Δ of 50 and 1e-6 side by side: decays of exactly 0 and of nearly 1."""
    case = Case(t=24, e=16, options="D z", initial=True, plan=make_plan(segments))
    arguments = make_arguments(case)
    dt_bte = np.where(np.arange(24)[:, None] % 5 == 3, 50.0, 1e-6) * np.ones((2, 24, 16))
    dt_bte[..., :8] = 1e-6  # channels that never forget
    arguments["dt_bte"] = jnp.asarray(dt_bte, jnp.float32)
    arguments["A_en"] = jnp.full_like(arguments["A_en"], -16.0).at[:, 0].set(-1e-3)
    (y_bte, state_ben), gradients = run(case, arguments)
    (true_y_bte, true_state_ben), true_gradients = run_in_float64(case, arguments)
    assert_close(y_bte, true_y_bte, "y")
    assert_close(state_ben, true_state_ben, "final state")
    for name, gradient in gradients.items():
        assert_close(gradient, true_gradients[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [(1, 1), (16, 16)])
def test_a_long_sequence(segments):
    case = Case(t=65_536, e=16, b=1, plan=make_plan(segments, chunk=64, groups=(4, 2)))
    arguments = make_arguments(case)
    (y_bte, state_ben), gradients = run(case, arguments)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(v, np.float64)) for name, v in arguments.items()}
        (_, truth), true_gradients = make_scalar(reference.scan, case, None)(wide)
    assert_close(y_bte, truth[0], "y")
    assert_close(state_ben, truth[1], "final state")
    for name, gradient in gradients.items():
        # A, D and the bias add 65,536 terms one after the other: 2^-24·√65536 = 1.5e-5 expected.
        size = np.abs(true_gradients[name]).max()
        assert np.abs(np.asarray(gradient) - true_gradients[name]).max() <= 5e-5 * size, name


def test_softplus_keeps_its_digits():
    v = np.concatenate([np.linspace(-80, 80, 4001), np.logspace(-6, 1, 100)]).astype(np.float32)
    small = {}
    ours, small["e"] = Math(interpret=True).softplus(jnp.asarray(v))
    slope = Math(interpret=True).softplus_slope(jnp.asarray(v), small["e"])
    wide = v.astype(np.float64)
    # Four roundings of 2^-24 and 80·2^-24 of the exponent |v|·log2(e), which exp2 makes relative.
    np.testing.assert_allclose(ours, np.logaddexp(wide, 0), rtol=6e-6)
    near = np.abs(v) < 8
    np.testing.assert_allclose(ours[near], np.logaddexp(wide, 0)[near], rtol=8e-7)
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-wide)), rtol=6e-6)


def test_every_size_of_the_guide_fits():
    for size in presets.SIZES.values():
        assert pallas_gpu.supports(2 * size.d_model, 16, jnp.bfloat16) is None
        assert Tile(32, 4).fit(2 * size.d_model).block_channels == 32


@pytest.mark.parametrize(
    ("e", "n", "dtype", "words"),
    [
        (64, 12, "float32", "d_state of 8, 16, 32, not 12"),
        (40, 16, "float32", "d_inner divisible by 16, not 40"),
        (64, 16, "float16", "bfloat16 and float32, not float16"),
    ],
)
def test_what_does_not_fit_is_named(e, n, dtype, words):
    assert words in pallas_gpu.supports(e, n, dtype)
    case = Case(t=3, e=e, n=n, narrow=dtype)
    with pytest.raises(ValueError, match=words):
        pallas_gpu.scan(**make_arguments(case), interpret=True)


@pytest.mark.parametrize(
    ("capability", "words"),
    [("7.5", "capability 8.0 or later, not 7.5"), ("gfx942", "not gfx942"), ("8.0", None)],
)
def test_a_card_that_cannot_run_it_is_named(monkeypatch, capability, words):
    card = types.SimpleNamespace(platform="gpu", device_kind="card", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [card])
    fault = pallas_gpu.supports(64, 16, "float32")
    assert fault is None if words is None else words in fault


def test_segments_cover_every_token_once():
    for tokens in (1, 7, 8, 9, 40, 41):
        for segments in (1, 2, 3, 8):
            loop = TimeLoop.divide(tokens, 8, 4, segments)
            last = tokens - (loop.segments - 1) * loop.segment_tokens
            assert 0 < last <= loop.segment_tokens and loop.segments <= segments


def test_rows_on_four_devices_stay_there(monkeypatch):
    """And each device has a plan for its one row, here split in segments, not for all four."""
    planned_rows = []

    def choose(b, t, e):
        planned_rows.append(b)
        return make_plan((2, 3) if b == 1 else (1, 1))

    monkeypatch.setattr(tuning, "choose", choose)
    case = Case(t=9, b=4, initial=True, resets=(0, 5))
    arguments, reset_bt = make_arguments(case), make_reset(case)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = NamedSharding(mesh, P(("a", "b"))), NamedSharding(mesh, P())
    shared = ("A_en", "D_e", "dt_bias_e")
    shardings = {name: whole if name in shared else rows for name in arguments}
    scan = functools.partial(pallas_gpu.scan, interpret=True)
    on_one = make_scalar(scan, case, reset_bt)
    on_four = jax.jit(on_one, in_shardings=(shardings,))
    program = on_four.lower(arguments).compile().as_text()
    assert planned_rows[-1] == 1
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    assert "all-reduce" in program  # of the shared parameters' gradients
    (_, values), gradients = on_four(jax.device_put(arguments, shardings))
    assert gradients["x_bte"].sharding.is_equivalent_to(rows, 3)
    (_, true_values), true_gradients = on_one(arguments)
    for ours, truth in zip(values, true_values, strict=True):
        assert_close(ours, truth, "value")
    for name in gradients:
        assert_close(gradients[name], true_gradients[name], name)


def test_a_divided_program_is_named_for_what_it_does():
    """Compiled programs are found on disk by their text, which does not include the kernels."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))

    def names(**options):
        case = Case(t=4, e=16, options="")
        scan = functools.partial(pallas_gpu.scan, **{"interpret": True, **options})
        scalar = jax.grad(lambda arguments: scan(**arguments)[0].sum())
        rows = {
            name: NamedSharding(mesh, P() if name == "A_en" else P("a"))
            for name in make_arguments(case)
        }
        text = jax.jit(scalar, in_shardings=(rows,)).lower(make_arguments(case)).as_text()
        return set(re.findall(r"@(selective_scan_[0-9a-f]{16})\(", text))

    first = names(plan=make_plan())
    assert len(first) == 2 and first == names(plan=make_plan())  # one for each direction
    others = [
        {"plan": make_plan(groups=(1, 1))},
        {"plan": make_plan(), "dt_softplus": True},
        {"plan": make_plan(), "signed": True},
        {},
    ]
    for options in others:
        assert not first & names(**options), options
