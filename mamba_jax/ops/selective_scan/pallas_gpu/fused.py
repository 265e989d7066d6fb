"""The selective scan by the kernels, differentiable.

Shapes: b batch, t time, e d_inner, n d_state, s segment, j block of channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mamba_jax.ops.selective_scan.epilogue import SAVEABLE
from mamba_jax.ops.selective_scan.pallas_gpu import backward, forward, split, tuning
from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import DROP, Arrays
from mamba_jax.ops.selective_scan.pallas_gpu.partition import by_rows
from mamba_jax.ops.selective_scan.pallas_gpu.time_loop import TimeLoop

STATE_SIZES = (8, 16, 32)
CHANNELS_MULTIPLE = 16
MIN_CAPABILITY = 8.0  # the first with bfloat16 conversions
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def supports(d_inner: int, d_state: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns None if the kernels take this shape and dtype, else a sentence that says why not.

    Where this machine has a GPU, it must be one that they run on; another machine's is not checked.

    Raises:
      ValueError: if the user's tuning table is damaged (see ``tuning.table``).
    """
    device = jax.devices()[0]
    if device.platform == "gpu":
        tuning.table()
        capability = str(device.compute_capability)  # for AMD's cards, a name such as gfx942
        if not (capability[0].isdigit() and float(capability) >= MIN_CAPABILITY):
            return (
                "the pallas_gpu scan takes an NVIDIA GPU of compute capability "
                f"{MIN_CAPABILITY} or later, not {capability}"
            )
    if d_state not in STATE_SIZES:
        sizes = ", ".join(map(str, STATE_SIZES))
        return f"the pallas_gpu scan takes a d_state of {sizes}, not {d_state}"
    if d_inner < CHANNELS_MULTIPLE or d_inner % CHANNELS_MULTIPLE:
        return (
            f"the pallas_gpu scan takes a d_inner divisible by {CHANNELS_MULTIPLE}, not {d_inner}"
        )
    if jnp.dtype(dtype) not in DTYPES:
        return f"the pallas_gpu scan takes bfloat16 and float32, not {jnp.dtype(dtype)}"
    return None


def scan(
    x_bte: jax.Array,
    dt_bte: jax.Array,
    A_en: jax.Array,
    B_btn: jax.Array,
    C_btn: jax.Array,
    *,
    D_e: jax.Array | None = None,
    z_bte: jax.Array | None = None,
    dt_bias_e: jax.Array | None = None,
    dt_softplus: bool = False,
    initial_state_ben: jax.Array | None = None,
    reset_bt: jax.Array | None = None,
    signed: bool = False,
    interpret: bool = False,
    plan: tuning.ScanPlan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the scan with its prologue and epilogue fused; arguments as of ``selective_scan``.

    x, z, B, C and dt are each bfloat16 or float32; all sums are float32. A reset
    multiplies the state before it by 0, so that state must be finite.

    Args:
      interpret: whether to run the kernels as plain JAX, on any platform, slowly.
      plan: the shape of the programs; None: the one tuned for this GPU and for the rows of
        each device.

    Raises:
      ValueError: for a shape or a dtype that the kernels do not take (see ``supports``).
    """
    _, t, e = x_bte.shape
    n = A_en.shape[1]
    for array in (x_bte, dt_bte, B_btn, C_btn, *([] if z_bte is None else [z_bte])):
        if fault := supports(e, n, array.dtype):
            raise ValueError(fault)
    if t == 0:
        raise ValueError(f"the pallas_gpu scan needs at least one token, got x of {x_bte.shape}")
    float32 = lambda v: None if v is None else v.astype(jnp.float32)
    inputs = {
        "x": x_bte,
        "dt": dt_bte,
        "A": float32(A_en),
        "B": B_btn,
        "C": C_btn,
        "D": float32(D_e),
        "z": z_bte,
        "dt_bias": float32(dt_bias_e),
        "initial": float32(initial_state_ben),
        "drop": None if reset_bt is None else jnp.where(reset_bt, jnp.float32(DROP), 0.0),
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return _scan(_Options(plan, dt_softplus, signed, interpret), inputs)


@dataclasses.dataclass(frozen=True)
class _Options:
    plan: tuning.ScanPlan | None
    softplus: bool
    signed: bool
    interpret: bool

    @property
    def common(self) -> dict[str, bool]:
        """What every kernel depends on."""
        return {"softplus": self.softplus, "signed": self.signed, "interpret": self.interpret}

    def key(self, name: str) -> str:
        """What a pass of this name depends on, besides its inputs: see ``by_rows``."""
        return f"{name} {self} {self.plan or tuning.this_tuning()}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: _Options, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(_run_forward, options, save=False)
    results = by_rows(run, inputs, options.key("inference"))
    return results["y"], results["final"]


def _scan_forward(options: _Options, inputs: Arrays):
    run = functools.partial(_run_forward, options, save=True)
    results = by_rows(run, inputs, options.key("forward"))
    y_bte, starts_bken = checkpoint_name((results["y"], results["starts"]), SAVEABLE)
    return (y_bte, results["final"]), (inputs, starts_bken)


def _scan_backward(options: _Options, saved: tuple, cotangents: tuple) -> tuple[Arrays]:
    inputs, starts_bken = saved
    dy_bte, dfinal_ben = cotangents
    sums = by_rows(
        functools.partial(_run_backward, options),
        {**inputs, "starts": starts_bken, "dy": dy_bte, "final": dfinal_ben},
        options.key("backward"),
    )
    gradients = {name: sums[name] for name in ("x", "dt", "z", "initial") if name in inputs}
    for name in ("B", "C"):  # over blocks of channels
        gradients[name] = sums[name].sum(1).astype(inputs[name].dtype)
    for name in ("A", "D", "dt_bias"):  # over rows
        if name in inputs:
            gradients[name] = sums[name].sum(0)
    if "drop" in inputs:  # resets are boolean: they have no gradient
        gradients["drop"] = jnp.zeros_like(inputs["drop"])
    return (gradients,)


_scan.defvjp(_scan_forward, _scan_backward)


def _run_forward(options: _Options, inputs: Arrays, *, save: bool) -> Arrays:
    b, t, e = inputs["x"].shape  # b: of one device
    plan = options.plan or tuning.choose(b, t, e)
    tile = plan.forward.fit(e)
    loop = TimeLoop.divide(t, plan.chunk_tokens, tile.group_tokens, plan.forward_segments)
    common = options.common
    inputs = dict(inputs)
    initial_ben = inputs.pop("initial", None)
    if loop.segments > 1:
        if initial_ben is None:
            initial_ben = jnp.zeros((b, *inputs["A"].shape), jnp.float32)
        ends = forward.ends(inputs, loop, tile, **common)
        inputs["edge"] = split.segment_starts(ends, initial_ben, inputs, loop)
    elif initial_ben is not None:
        inputs["edge"] = initial_ben[:, None]
    return forward.scan(inputs, loop, tile, save=save, **common)


def _run_backward(options: _Options, inputs: Arrays) -> Arrays:
    b, t, e = inputs["x"].shape
    plan = options.plan or tuning.choose(b, t, e)
    tile = plan.backward.fit(e)
    loop = TimeLoop.divide(t, plan.chunk_tokens, tile.group_tokens, plan.backward_segments)
    common = options.common
    inputs = {name: value for name, value in inputs.items() if name != "initial"}
    dfinal_ben = inputs.pop("final")
    if loop.segments > 1:
        ends = backward.ends(inputs, loop, tile, **common)
        inputs["edge"] = split.segment_edges(ends, dfinal_ben, inputs, loop)
    else:
        inputs["edge"] = dfinal_ben[:, None]
    sums = backward.scan(inputs, loop, tile, **common)
    for name in ("A", "D", "dt_bias"):  # over segments: only this device knows how many
        if name in sums:
            sums[name] = sums[name].sum(1)
    return sums
