"""The backward kernels: the adjoint of the scan, and the adjoint's ends of segments.

With g_t the gradient of the state h_t by y_t and all that comes after it, a_t the decay, a'_t its
slope by the exponent Δ_t A, p the output before the gate, σ the sigmoid and dp = dy silu(z):
  g_t = C_t dp_t + a_{t+1} g_{t+1},   q_t = g_t a'_t h_{t-1}  (the gradient of the exponent)
  dC_t = Σ_e h_t dp_t,   dB_t = Σ_e g_t Δ_t x_t,   dz = dy p σ(z) (1 + z (1 - σ(z)))
  dx_t = Δ_t Σ_n g_t B_t + D dp_t,   dΔ_t = x_t Σ_n g_t B_t + Σ_n q_t A,   dA = Σ_t q_t Δ_t
The forward saved the states before chunks. A chunk's states are recomputed twice: first those
before its groups, into a scratch that its program reuses for every chunk (so that it stays in the
L2 cache), then those within a group, in registers. dB and dC are summed over a program's channels
only; the caller adds the programs' sums, in an order that is always the same.

Shapes: b batch, t time, e d_inner, n d_state, s segment, k chunk, j block of channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mamba_jax.ops.selective_scan.pallas_gpu import kernel_io
from mamba_jax.ops.selective_scan.pallas_gpu.arithmetic import LN_2, Math
from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Arrays, Reader, Tile
from mamba_jax.ops.selective_scan.pallas_gpu.time_loop import TimeLoop


def scan(
    inputs: Arrays, loop: TimeLoop, tile: Tile, *, softplus: bool, signed: bool, interpret: bool
) -> Arrays:
    """Runs the segments side by side.

    Args:
      inputs: those of the forward, ``starts`` (b, k, e, n), which it saved for the same chunks,
        ``dy`` (b, t, e), and as ``edge`` (b, s, e, n) the gradient of the state after each segment.
      loop: the division of time.
      tile: the shape of a program; its block divides e.
      softplus: whether Δ = softplus(dt + dt_bias).
      signed: as in ``decay``.
      interpret: whether to run as plain JAX.

    Returns:
      ``x``, ``dt``, ``z``: gradients in their input's dtype. Float32 sums: ``B``, ``C``
      (b, j, t, n), ``A`` (b, s, e, n), ``D``, ``dt_bias`` (b, s, e), ``initial`` (b, e, n).
    """
    b, t, e = inputs["x"].shape
    n, block, s = inputs["A"].shape[1], tile.block_channels, loop.segments
    like = lambda name: jax.ShapeDtypeStruct((b, t, e), inputs[name].dtype)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    along = pl.BlockSpec((None, t, block), lambda b, j, s: (b, 0, j))
    partial = pl.BlockSpec((None, None, t, n), lambda b, j, s: (b, j, 0, 0))
    groups = -(-loop.chunk_tokens // loop.group_tokens)
    outputs = {
        "x": (along, like("x")),
        "dt": (along, like("dt")),
        "B": (partial, float32(b, e // block, t, n)),
        "C": (partial, float32(b, e // block, t, n)),
        "A": (kernel_io.segment_states(block, n), float32(b, s, e, n)),
        "initial": (
            pl.BlockSpec((None, block, n), lambda b, j, s: (b, j, 0)),
            float32(b, e, n),
        ),
        "scratch": (
            pl.BlockSpec((None, None, groups, block, n), lambda b, j, s: (b, s, 0, j, 0)),
            float32(b, s, groups, e, n),
        ),
    }
    if "z" in inputs:
        outputs["z"] = (along, like("z"))
    for name in ("D", "dt_bias"):
        if name in inputs:
            outputs[name] = (kernel_io.segment_vectors(block), float32(b, s, e))
    in_specs = kernel_io.block_specs(inputs.keys() - {"starts"}, block, t, n)
    in_specs["starts"] = kernel_io.chunk_states(block, loop.chunks, n)
    gradients = pl.pallas_call(
        functools.partial(
            _scan_kernel, loop=loop, math=Math(interpret), softplus=softplus, signed=signed
        ),
        grid=(b, e // block, s),
        in_specs=[in_specs],
        out_specs={name: spec for name, (spec, _) in outputs.items()},
        out_shape={name: shape for name, (_, shape) in outputs.items()},
        compiler_params=kernel_io.compiler_params(tile),
        interpret=interpret,
        name="selective_scan_backward",
    )(inputs)
    del gradients["scratch"]
    return gradients


def ends(
    inputs: Arrays, loop: TimeLoop, tile: Tile, *, softplus: bool, signed: bool, interpret: bool
) -> Arrays:
    """Runs every segment except the first backwards from zeros: what ``split.segment_edges`` joins.

    Returns:
      ``end`` (b, s - 1, e, n), the gradient of the state before each segment by its own outputs,
      and ``span``: see ``kernel_io.run_ends``.
    """
    names = ("dt", "A", "C", "z", "dt_bias", "drop", "dy")
    kernel = functools.partial(
        _ends_kernel, loop=loop, math=Math(interpret), softplus=softplus, signed=signed
    )
    inputs = {name: inputs[name] for name in names if name in inputs}
    name = "selective_scan_backward_ends"
    return kernel_io.run_ends(kernel, name, inputs, loop, tile, signed=signed, interpret=interpret)


def _scan_kernel(inputs, outputs, *, loop: TimeLoop, math: Math, softplus: bool, signed: bool):
    reader = Reader(inputs, math, softplus, signed)
    segment = pl.program_id(2) if loop.segments > 1 else 0
    chunk_tokens, group_tokens = loop.chunk_tokens, loop.group_tokens
    scratch = outputs["scratch"]

    def remake(start, tokens, state_en):
        """Returns the states before each token of a group and after the last, and the inputs."""
        x_te, dt_te, B_tn = (reader.rows(name, start, tokens) for name in ("x", "dt", "B"))
        drop_t = reader.drops(start, tokens)
        states, powers, steps, slopes = [state_en], [], [], []
        for i in range(tokens):
            step_e, slope = reader.step_size(dt_te[i])
            power_en = reader.power(step_e, drop_t[i])
            decay_en = reader.decay(power_en, drop_t[i])
            state_en = reader.advance(state_en, decay_en, step_e * x_te[i], B_tn[i])
            states.append(state_en)
            powers.append(power_en)
            steps.append(step_e)
            slopes.append(slope)
        return states, powers, steps, slopes, x_te, B_tn

    def group_back(start, tokens, state_en, carry):
        g_en, sums = carry
        dy_te, C_tn = (reader.rows(name, start, tokens) for name in ("dy", "C"))
        z_te = reader.rows("z", start, tokens) if "z" in inputs else None
        drop_t = reader.drops(start, tokens)
        states, powers, steps, slopes, x_te, B_tn = remake(start, tokens, state_en)
        sums = dict(sums)
        for i in reversed(range(tokens)):
            token = start + i
            x_e, step_e, B_n, C_n = x_te[i], steps[i], B_tn[i], C_tn[i]
            dp_e = dy_te[i]
            if z_te is not None:
                z_e = z_te[i]
                sigmoid_e = math.sigmoid(z_e)
                p_e = jnp.sum(states[i + 1] * C_n[None, :], axis=1)
                if reader.skip_e is not None:
                    p_e = math.fma(reader.skip_e, x_e, p_e)
                slope_e = sigmoid_e * math.fma(z_e, 1.0 - sigmoid_e, jnp.ones_like(z_e))
                outputs["z"][token, :] = (dp_e * p_e * slope_e).astype(outputs["z"].dtype)
                dp_e = dp_e * (z_e * sigmoid_e)
            g_en = math.fma(dp_e[:, None], C_n[None, :], g_en)
            outputs["C"][token, :] = jnp.sum(dp_e[:, None] * states[i + 1], axis=0)
            outputs["B"][token, :] = jnp.sum((step_e * x_e)[:, None] * g_en, axis=0)
            du_e = jnp.sum(g_en * B_n[None, :], axis=1)
            g_en, q_en = reader.adjoint(g_en, powers[i], drop_t[i])
            q_en = q_en * states[i]
            sums["A"] = math.fma(q_en, step_e[:, None], sums["A"])
            dstep_e = jnp.sum(q_en * reader.rate2_en, axis=1) * LN_2
            dstep_e = math.fma(x_e, du_e, dstep_e)
            dx_e = step_e * du_e
            if reader.skip_e is not None:
                dx_e = math.fma(reader.skip_e, dp_e, dx_e)
                sums["D"] = math.fma(dp_e, x_e, sums["D"])
            outputs["x"][token, :] = dx_e.astype(outputs["x"].dtype)
            slope = slopes[i]
            ddt_e = dstep_e if slope is None else dstep_e * slope()
            outputs["dt"][token, :] = ddt_e.astype(outputs["dt"].dtype)
            if "dt_bias" in sums:
                sums["dt_bias"] = sums["dt_bias"] + ddt_e
        return g_en, sums

    def chunk(k, tokens, carry):
        start = k * chunk_tokens

        def group_start(g, tokens, state_en):
            scratch[g, :, :] = state_en
            return remake(start + g * group_tokens, tokens, state_en)[0][-1]

        state_en = inputs["starts"][k, :, :]
        groups = -(-tokens // group_tokens)
        before_last = (groups - 1) * group_tokens  # tokens before the last group, whole groups
        state_en = loop.over_groups(before_last, group_start, state_en)
        if not math.interpret:
            plt.debug_barrier()  # in case a lane reads what another one has written
        rest = tokens - before_last
        carry = group_back(start + before_last, rest, state_en, carry)
        step = lambda g, tokens, carry: group_back(
            start + g * group_tokens, tokens, scratch[g, :, :], carry
        )
        carry = loop.over_groups(before_last, step, carry, reverse=True)
        if not math.interpret:
            plt.debug_barrier()  # and it must not be overwritten before that
        return carry

    zeros_en = jnp.zeros_like(reader.rate2_en)
    sums = {"A": zeros_en}
    sums |= {name: jnp.zeros_like(zeros_en[:, 0]) for name in ("D", "dt_bias") if name in inputs}
    g_en, sums = loop.over_chunks(segment, chunk, (inputs["edge"][...], sums), reverse=True)
    for name, value in sums.items():
        outputs[name][...] = value

    def store_initial():
        outputs["initial"][...] = g_en

    if loop.segments == 1:
        store_initial()
    else:
        pl.when(segment == 0)(store_initial)


def _ends_kernel(inputs, outputs, *, loop: TimeLoop, math: Math, softplus: bool, signed: bool):
    reader = Reader(inputs, math, softplus, signed)

    def group(start, tokens, carry):
        g_en, span = carry
        dy_te, dt_te, C_tn = (reader.rows(name, start, tokens) for name in ("dy", "dt", "C"))
        z_te = reader.rows("z", start, tokens) if "z" in inputs else None
        drop_t = reader.drops(start, tokens)
        for i in reversed(range(tokens)):
            dp_e = dy_te[i]
            if z_te is not None:
                dp_e = dp_e * (z_te[i] * math.sigmoid(z_te[i]))
            step_e, _ = reader.step_size(dt_te[i])
            g_en = math.fma(dp_e[:, None], C_tn[i][None, :], g_en)
            decay_en = reader.decay(reader.power(step_e, drop_t[i]), drop_t[i])
            g_en = g_en * decay_en
            span = reader.span(span, step_e, decay_en)
        return g_en, span

    def chunk(k, tokens, carry):
        start, size = k * loop.chunk_tokens, loop.group_tokens
        step = lambda g, tokens, carry: group(start + g * size, tokens, carry)
        return loop.over_groups(tokens, step, carry, reverse=True)

    zeros_en = jnp.zeros_like(reader.rate2_en)
    segment = pl.program_id(2) + 1
    g_en, span = loop.over_chunks(segment, chunk, (zeros_en, reader.no_span()), reverse=True)
    outputs["end"][...] = g_en
    outputs["span"][...] = span
