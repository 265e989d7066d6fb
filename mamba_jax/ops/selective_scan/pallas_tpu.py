"""The selective scan for TPU: one Pallas kernel forward, the chunked form's adjoint backward.

A program loops over one chunk of time for one row and a block of channels, the states in registers.
Channels are laid out as (rows, 128) tiles, so that every operation of a step fills the vector unit;
B_t and C_t are scalars from scalar memory. Bias, softplus, skip and gate are fused. Programs follow
each other in time, and hand the state on in scratch memory.

The state at each chunk's start is written for the gradient only, which is ``chunked.backward``:
exact, and O(B·L·D) in memory, but XLA's speed.

Shapes: b batch, t time, e d_inner, n d_state, c chunk length, k chunks, r rows of 128 channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan import chunked
from mamba_jax.ops.selective_scan.decay import decay
from mamba_jax.ops.selective_scan.epilogue import SAVEABLE, start_state

LANES = 128
MAX_ROWS = 8  # with n = 16 states, 16 of the 64 vector registers
MAX_STATES = 32  # 32 × 8 rows: half of the registers; the steps of n are unrolled
DTYPES = ("bfloat16", "float32")


def supports(d_inner: int, d_state: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Returns None if the kernel takes this shape and dtype, else a sentence that says why not."""
    if d_state > MAX_STATES:
        return f"the pallas_tpu scan takes a d_state of up to {MAX_STATES}, not {d_state}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"the pallas_tpu scan takes bfloat16 and float32, not {jnp.dtype(dtype)}"
    return None  # channels are padded to whole tiles


def scan(
    x_bte: Float[Array, "b t e"],
    dt_bte: Float[Array, "b t e"],
    A_en: Float[Array, "e n"],
    B_btn: Float[Array, "b t n"],
    C_btn: Float[Array, "b t n"],
    *,
    D_e: Float[Array, "e"] | None = None,
    z_bte: Float[Array, "b t e"] | None = None,
    dt_bias_e: Float[Array, "e"] | None = None,
    dt_softplus: bool = False,
    initial_state_ben: Float[Array, "b e n"] | None = None,
    reset_bt: Bool[Array, "b t"] | None = None,
    signed: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """See ``selective_scan``.

    Raises:
      ValueError: for a shape or a dtype that the kernel does not take (see ``supports``).
    """
    for array in (x_bte, dt_bte, B_btn, C_btn, *([] if z_bte is None else [z_bte])):
        if fault := supports(x_bte.shape[2], A_en.shape[1], array.dtype):
            raise ValueError(fault)
    state_ben = start_state(initial_state_ben, x_bte, A_en, jnp.dtype(jnp.float32))
    c, weights, tokens = chunked.prepare(
        (x_bte, dt_bte, z_bte, B_btn, C_btn, reset_bt), (A_en, D_e, dt_bias_e), state_ben.dtype
    )
    t = x_bte.shape[1]
    results: tuple[jax.Array, jax.Array] = _scan(
        c, t, dt_softplus, signed, interpret, weights, state_ben, tokens
    )
    y_bte, final_ben = results
    return y_bte[:, :t], final_ben


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _scan(
    c, t, dt_softplus, signed, interpret, weights, initial_ben, tokens
) -> tuple[jax.Array, jax.Array]:
    y_bte, final_ben = _run(
        c, t, dt_softplus, signed, interpret, weights, initial_ben, tokens, False
    )
    return y_bte, final_ben


def _forward(c, t, dt_softplus, signed, interpret, weights, initial_ben, tokens):
    arguments = (c, t, dt_softplus, signed, interpret, weights, initial_ben, tokens)
    y_bte, final_ben, start_kben = _run(*arguments, True)
    y_bte, start_kben = checkpoint_name((y_bte, start_kben), SAVEABLE)
    return (y_bte, final_ben), (weights, start_kben, tokens)


def _backward(c, t, dt_softplus, signed, interpret, saved, cotangents):
    return chunked.backward(c, t, dt_softplus, signed, saved, cotangents)


_scan.defvjp(_forward, _backward)


def _run(c, t, dt_softplus, signed, interpret, weights, initial_ben, tokens, with_starts):
    """Returns y, the final state and, where asked, the state at each chunk's start (k, b, e, n)."""
    x_bte, dt_bte, z_bte, B_btn, C_btn, reset_bt = tokens
    A_ben, D_be, dt_bias_be = weights
    b, length, e = x_bte.shape
    n, k = A_ben.shape[2], length // c
    tiles = -(-e // LANES)
    rows = min(MAX_ROWS, tiles)
    tiles = -(-tiles // rows) * rows
    padding = tiles * LANES - e

    def tiled(v):  # (..., e) -> (..., tiles, 128)
        v = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, padding)])
        return v.reshape(*v.shape[:-1], tiles, LANES)

    def untiled(v):
        return v.reshape(*v.shape[:-2], tiles * LANES)[..., :e]

    along = pl.BlockSpec((None, c, rows, LANES), lambda i, j, k: (i, k, j, 0))
    vector = pl.BlockSpec((rows, LANES), lambda i, j, k: (j, 0))
    matrix = pl.BlockSpec((n, rows, LANES), lambda i, j, k: (0, j, 0))
    state = pl.BlockSpec((None, n, rows, LANES), lambda i, j, k: (i, 0, j, 0))
    starts = pl.BlockSpec((None, None, n, rows, LANES), lambda i, j, k: (k, i, 0, j, 0))
    # Scalars, (1, c · n) of a chunk: the last two axes of a block must be whole axes of the array.
    scalars = lambda width: pl.BlockSpec(
        (None, None, 1, c * width), lambda i, j, k: (i, k, 0, 0), memory_space=pltpu.SMEM
    )
    as_scalars = lambda v_btn: v_btn.reshape(b, k, 1, -1)
    # Padding leaves the state unchanged: the kernel multiplies Δ by this.
    counts_t = (jnp.arange(length) < t).astype(jnp.float32)
    counts_bt = jnp.broadcast_to(counts_t, (b, length)) if t != length else None
    float32 = lambda v: v.astype(jnp.float32)
    inputs = {
        "x": (along, tiled(x_bte)),
        "dt": (along, tiled(dt_bte)),
        "A": (matrix, tiled(A_ben[0].T)),
        "B": (scalars(n), as_scalars(float32(B_btn))),
        "C": (scalars(n), as_scalars(float32(C_btn))),
        "h0": (state, tiled(jnp.swapaxes(initial_ben, 1, 2))),
        "D": None if D_be is None else (vector, tiled(D_be[0])),
        "bias": None if dt_bias_be is None else (vector, tiled(dt_bias_be[0])),
        "z": None if z_bte is None else (along, tiled(z_bte)),
        "keep": None if reset_bt is None else (scalars(1), as_scalars(float32(~reset_bt))),
        "counts": None if counts_bt is None else (scalars(1), as_scalars(counts_bt)),
    }
    inputs = {name: pair for name, pair in inputs.items() if pair is not None}
    shape = (n, tiles, LANES)
    out_shape = [
        jax.ShapeDtypeStruct((b, length, tiles, LANES), x_bte.dtype),
        jax.ShapeDtypeStruct((b, *shape), jnp.float32),
    ]
    if with_starts:
        out_shape.append(jax.ShapeDtypeStruct((k, b, *shape), jnp.float32))
    outputs = pl.pallas_call(
        functools.partial(
            _kernel, names=tuple(inputs), c=c, n=n, dt_softplus=dt_softplus, signed=signed
        ),
        grid=(b, tiles // rows, k),
        in_specs=[spec for spec, _ in inputs.values()],
        out_specs=[along, state, starts][: len(out_shape)],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((n, rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="selective_scan",
    )(*[array for _, array in inputs.values()])
    y_bte, *states = map(untiled, outputs)
    return (y_bte, *(jnp.swapaxes(v, -1, -2) for v in states))


def _kernel(*refs, names, c, n, dt_softplus, signed):
    """One chunk of one row and ``rows`` × 128 channels; the grid's last axis is time."""
    inputs = dict(zip(names, refs, strict=False))
    y_ref, final_ref, *start_ref, state_ref = refs[len(names) :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = inputs["h0"][...]

    if start_ref:
        start_ref[0][...] = state_ref[...]

    def step(i, state_n):
        x = inputs["x"][i].astype(jnp.float32)
        dt = inputs["dt"][i].astype(jnp.float32)
        if "bias" in inputs:
            dt += inputs["bias"][...]
        if dt_softplus:
            dt = jnp.maximum(dt, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(dt)))
        if "counts" in inputs:
            dt *= inputs["counts"][0, i]
        u = dt * x
        y = inputs["D"][...] * x if "D" in inputs else jnp.zeros_like(x)
        after_n = []
        for j, state in enumerate(state_n):
            a = decay(jnp.exp(dt * inputs["A"][j]), signed)
            if "keep" in inputs:
                a *= inputs["keep"][0, i]
            state = a * state + u * inputs["B"][0, i * n + j]
            y += state * inputs["C"][0, i * n + j]
            after_n.append(state)
        if "z" in inputs:
            z = inputs["z"][i].astype(jnp.float32)
            y *= z * jax.nn.sigmoid(z)
        y_ref[i] = y.astype(y_ref.dtype)
        return tuple(after_n)

    state_n = lax.fori_loop(0, c, step, tuple(state_ref[j] for j in range(n)))
    for j, state in enumerate(state_n):
        state_ref[j] = state
    final_ref[...] = state_ref[...]  # the last chunk's remains
