"""The forward kernels: the scan itself, and the end states of segments.

Shapes: b batch, t time, e d_inner, n d_state, s segment, k chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mamba_jax.ops.selective_scan.pallas_gpu import kernel_io
from mamba_jax.ops.selective_scan.pallas_gpu.arithmetic import Math
from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Arrays, Reader, Tile
from mamba_jax.ops.selective_scan.pallas_gpu.time_loop import TimeLoop


def scan(
    inputs: Arrays,
    loop: TimeLoop,
    tile: Tile,
    *,
    softplus: bool,
    signed: bool,
    save: bool,
    interpret: bool,
) -> Arrays:
    """Runs the segments side by side.

    Args:
      inputs: ``x``, ``dt``, ``A``, ``B``, ``C`` and, where wanted, ``D``, ``z``, ``dt_bias`` and
        ``drop`` as (b, t) float32 (see ``kernel_io.DROP``); ``edge`` (b, s, e, n): the state before
        each segment, absent for one segment that starts from zeros.
      loop: the division of time.
      tile: the shape of a program; its block divides e.
      softplus: whether Δ = softplus(dt + dt_bias).
      signed: as in ``decay``.
      save: whether the state before each chunk is wanted.
      interpret: whether to run as plain JAX.

    Returns:
      ``y`` (b, t, e) in the dtype of x, ``final`` (b, e, n) float32, and ``starts`` (b, k, e, n)
      float32 if they are to be saved.
    """
    b, t, e = inputs["x"].shape
    n, block = inputs["A"].shape[1], tile.block_channels
    specs = {
        "y": pl.BlockSpec((None, t, block), lambda b, j, s: (b, 0, j)),
        "final": pl.BlockSpec((None, block, n), lambda b, j, s: (b, j, 0)),
    }
    shapes = {
        "y": jax.ShapeDtypeStruct((b, t, e), inputs["x"].dtype),
        "final": jax.ShapeDtypeStruct((b, e, n), jnp.float32),
    }
    if save:
        specs["starts"] = kernel_io.chunk_states(block, loop.chunks, n)
        shapes["starts"] = jax.ShapeDtypeStruct((b, loop.chunks, e, n), jnp.float32)
    return pl.pallas_call(
        functools.partial(
            _scan_kernel, loop=loop, math=Math(interpret), softplus=softplus, signed=signed
        ),
        grid=(b, e // block, loop.segments),
        in_specs=[kernel_io.block_specs(inputs, block, t, n)],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=kernel_io.compiler_params(tile),
        interpret=interpret,
        name="selective_scan_forward",
    )(inputs)


def ends(
    inputs: Arrays, loop: TimeLoop, tile: Tile, *, softplus: bool, signed: bool, interpret: bool
) -> Arrays:
    """Runs every segment except the last from zeros: what ``split.segment_starts`` joins.

    Returns:
      ``end`` (b, s - 1, e, n), the state after each segment, and ``span``: see
      ``kernel_io.run_ends``.
    """
    names = ("x", "dt", "A", "B", "dt_bias", "drop")
    kernel = functools.partial(
        _ends_kernel, loop=loop, math=Math(interpret), softplus=softplus, signed=signed
    )
    inputs = {name: inputs[name] for name in names if name in inputs}
    return kernel_io.run_ends(
        kernel, "selective_scan_ends", inputs, loop, tile, signed=signed, interpret=interpret
    )


def _scan_kernel(inputs, outputs, *, loop: TimeLoop, math: Math, softplus: bool, signed: bool):
    reader = Reader(inputs, math, softplus, signed)
    segment = pl.program_id(2) if loop.segments > 1 else 0

    def group(start, tokens, state_en):
        # All loads first: their latencies overlap.
        x_te, dt_te = (reader.rows(name, start, tokens) for name in ("x", "dt"))
        B_tn, C_tn = (reader.rows(name, start, tokens) for name in ("B", "C"))
        z_te = reader.rows("z", start, tokens) if "z" in inputs else None
        drop_t = reader.drops(start, tokens)
        for i in range(tokens):
            step_e, _ = reader.step_size(dt_te[i])
            decay_en = reader.decay(reader.power(step_e, drop_t[i]), drop_t[i])
            state_en = reader.advance(state_en, decay_en, step_e * x_te[i], B_tn[i])
            y_e = jnp.sum(state_en * C_tn[i][None, :], axis=1)
            if reader.skip_e is not None:
                y_e = math.fma(reader.skip_e, x_te[i], y_e)
            if z_te is not None:
                y_e = y_e * (z_te[i] * math.sigmoid(z_te[i]))
            outputs["y"][start + i, :] = y_e.astype(outputs["y"].dtype)
        return state_en

    def chunk(k, tokens, state_en):
        if "starts" in outputs:
            outputs["starts"][k, :, :] = state_en
        start, size = k * loop.chunk_tokens, loop.group_tokens
        step = lambda g, tokens, state_en: group(start + g * size, tokens, state_en)
        return loop.over_groups(tokens, step, state_en)

    state_en = inputs["edge"][...] if "edge" in inputs else jnp.zeros_like(reader.rate2_en)
    state_en = loop.over_chunks(segment, chunk, state_en)

    def store_final():
        outputs["final"][...] = state_en

    if loop.segments == 1:
        store_final()
    else:
        pl.when(segment == loop.segments - 1)(store_final)


def _ends_kernel(inputs, outputs, *, loop: TimeLoop, math: Math, softplus: bool, signed: bool):
    reader = Reader(inputs, math, softplus, signed)

    def group(start, tokens, carry):
        state_en, span = carry
        x_te, dt_te, B_tn = (reader.rows(name, start, tokens) for name in ("x", "dt", "B"))
        drop_t = reader.drops(start, tokens)
        for i in range(tokens):
            step_e, _ = reader.step_size(dt_te[i])
            decay_en = reader.decay(reader.power(step_e, drop_t[i]), drop_t[i])
            state_en = reader.advance(state_en, decay_en, step_e * x_te[i], B_tn[i])
            span = reader.span(span, step_e, decay_en)
        return state_en, span

    def chunk(k, tokens, carry):
        start, size = k * loop.chunk_tokens, loop.group_tokens
        step = lambda g, tokens, carry: group(start + g * size, tokens, carry)
        return loop.over_groups(tokens, step, carry)

    zeros_en = jnp.zeros_like(reader.rate2_en)
    state_en, span = loop.over_chunks(pl.program_id(2), chunk, (zeros_en, reader.no_span()))
    outputs["end"][...] = state_en
    outputs["span"][...] = span
