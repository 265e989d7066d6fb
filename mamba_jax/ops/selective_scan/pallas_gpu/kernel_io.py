"""What the kernels read and write: tiles, the blocks of their arrays, and the start of a pass.

Every program has one warp's worth of channels of one sequence and loops over one segment of time.
The grid is (b, e / block, segments).

Shapes: b batch, t time, e d_inner, n d_state, s segment, k chunk, j block of channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mamba_jax.ops.selective_scan.decay import adjoint, decay
from mamba_jax.ops.selective_scan.pallas_gpu.arithmetic import LOG2_E, Math
from mamba_jax.ops.selective_scan.pallas_gpu.time_loop import TimeLoop

# Added to the exponent Δ A, it makes exp(Δ A) exactly 0: what came before is dropped. It is finite,
# so that it never meets an infinity.
DROP = -1e30

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Tile:
    """The shape of one kernel's programs.

    Attributes:
      block_channels: channels of a program, a power of two; 32 is one for each lane.
      group_tokens: tokens whose loads are issued together; in the backward, whose states are in
        registers together.
      num_warps: warps that share a program's channels.
    """

    block_channels: int
    group_tokens: int
    num_warps: int = 1

    def fit(self, channels: int) -> "Tile":
        """Returns the tile with the largest block, up to its own, that divides ``channels``."""
        largest = channels & -channels
        return dataclasses.replace(self, block_channels=min(self.block_channels, largest))


class Reader:
    """The inputs of a program, read a token at a time as float32.

    Attributes:
      refs: the arrays by name; an absent name is an option not taken.
      rate2_en: A·log2(e), so that exp(Δ A) is a power of two.
    """

    def __init__(self, refs: dict[str, Any], math: Math, softplus: bool, signed: bool):
        self.refs, self.math, self.softplus, self.signed = refs, math, softplus, signed
        self.rate2_en = refs["A"][...] * LOG2_E
        self.dt_bias_e = refs["dt_bias"][...] if "dt_bias" in refs else None
        self.skip_e = refs["D"][...] if "D" in refs else None

    def rows(self, name: str, start: Any, tokens: int) -> list[jax.Array]:
        """Loads ``tokens`` rows of an array (t, ·)."""
        return [self.refs[name][start + i, :].astype(jnp.float32) for i in range(tokens)]

    def drops(self, start: Any, tokens: int) -> list[jax.Array | None]:
        """What a reset adds to a token's exponent: a scalar, 0 or ``DROP``; None without resets."""
        if "drop" not in self.refs:
            return [None] * tokens
        return [self.refs["drop"][start + i] for i in range(tokens)]

    def step_size(self, dt_e: jax.Array) -> tuple[jax.Array, Callable[[], jax.Array] | None]:
        """Returns Δ and, with a softplus, the function that computes its slope by dt."""
        v_e = dt_e if self.dt_bias_e is None else dt_e + self.dt_bias_e
        if not self.softplus:
            return v_e, None
        step_e, small_e = self.math.softplus(v_e)
        return step_e, lambda: self.math.softplus_slope(v_e, small_e)

    def power(self, step_e: jax.Array, drop: jax.Array | None) -> jax.Array:
        """exp(Δ A), or 0 where reset: (e, n)."""
        if drop is None:
            return self.math.exp2(step_e[:, None] * self.rate2_en)
        return self.math.exp2(self.math.fma(step_e[:, None], self.rate2_en, drop))

    def decay(self, power_en: jax.Array, drop: jax.Array | None) -> jax.Array:
        """The decay of a token with this ``power``, 0 where reset."""
        return decay(power_en, self.signed, self._reset(drop))

    def adjoint(
        self, g_en: jax.Array, power_en: jax.Array, drop: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """A gradient times the decay, and times its slope by Δ A; both are 0 where reset."""
        return adjoint(g_en, power_en, self.signed, self._reset(drop))

    def _reset(self, drop: jax.Array | None) -> jax.Array | None:
        return drop < 0.0 if self.signed and drop is not None else None

    def no_span(self) -> jax.Array:
        """The ``span`` of no tokens."""
        if self.signed:
            return jnp.ones_like(self.rate2_en)
        return jnp.zeros(self.rate2_en.shape[0], jnp.float32)

    def span(self, span: jax.Array, step_e: jax.Array, decay_en: jax.Array) -> jax.Array:
        """Adds a token to what a segment's decay depends on: ΣΔ (e), or Π a (e, n) if signed."""
        return span * decay_en if self.signed else span + step_e

    def advance(
        self, state_en: jax.Array, decay_en: jax.Array, u_e: jax.Array, B_n: jax.Array
    ) -> jax.Array:
        """The next state: decay·h + u B."""
        return self.math.fma(decay_en, state_en, u_e[:, None] * B_n[None, :])


def block_specs(names: Any, block: int, t: int, n: int) -> dict[str, pl.BlockSpec]:
    """Returns the block that a program gets of each named input: all of time, some channels."""
    along_channels = pl.BlockSpec((None, t, block), lambda b, j, s: (b, 0, j))
    along_states = pl.BlockSpec((None, t, n), lambda b, j, s: (b, 0, 0))
    per_channel = pl.BlockSpec((block,), lambda b, j, s: (j,))
    specs = {
        **dict.fromkeys(("x", "dt", "z", "dy"), along_channels),
        **dict.fromkeys(("B", "C"), along_states),
        **dict.fromkeys(("D", "dt_bias"), per_channel),
        "A": pl.BlockSpec((block, n), lambda b, j, s: (j, 0)),
        "drop": pl.BlockSpec((None, t), lambda b, j, s: (b, 0)),
        "edge": segment_states(block, n),
    }
    return {name: specs[name] for name in names}


def segment_states(block: int, n: int) -> pl.BlockSpec:
    """The block of an array (b, s, e, n)."""
    return pl.BlockSpec((None, None, block, n), lambda b, j, s: (b, s, j, 0))


def segment_vectors(block: int) -> pl.BlockSpec:
    """The block of an array (b, s, e)."""
    return pl.BlockSpec((None, None, block), lambda b, j, s: (b, s, j))


def chunk_states(block: int, chunks: int, n: int) -> pl.BlockSpec:
    """The block of an array (b, k, e, n)."""
    return pl.BlockSpec((None, chunks, block, n), lambda b, j, s: (b, 0, j, 0))


def run_ends(
    kernel: Callable[..., None],
    name: str,
    inputs: Arrays,
    loop: TimeLoop,
    tile: Tile,
    *,
    signed: bool,
    interpret: bool,
) -> Arrays:
    """Runs a kernel over all segments but one, each from zeros.

    Returns:
      ``end`` (b, s - 1, e, n), what each segment ends with, and its ``span``: the sum of its Δ
      (b, s - 1, e), or if signed the product of its decays (b, s - 1, e, n); all float32.
    """
    b, t, e = inputs["dt"].shape
    n, block, s = inputs["A"].shape[1], tile.block_channels, loop.segments - 1
    states = segment_states(block, n), jax.ShapeDtypeStruct((b, s, e, n), jnp.float32)
    vectors = segment_vectors(block), jax.ShapeDtypeStruct((b, s, e), jnp.float32)
    outputs = {"end": states, "span": states if signed else vectors}
    return pl.pallas_call(
        kernel,
        grid=(b, e // block, s),
        in_specs=[block_specs(inputs, block, t, n)],
        out_specs={name: spec for name, (spec, _) in outputs.items()},
        out_shape={name: shape for name, (_, shape) in outputs.items()},
        compiler_params=compiler_params(tile),
        interpret=interpret,
        name=name,
    )(inputs)


def compiler_params(tile: Tile) -> plt.CompilerParams:
    """Names the backend too: without it, some versions of jax would choose another one."""
    return plt.CompilerParams(num_warps=tile.num_warps, num_stages=1)
