"""The sequence in segments: what flows from one into the next.

A segment maps the state before it to (Π a) h + (its end from zeros), where the product of positive
decays is exp(A ΣΔ): so its end from zeros, and the sum of its Δ or the product of its signed
decays, are all that the others need. The same holds for gradients, backwards.

Shapes: b batch, t time, e d_inner, n d_state, s segment.
"""

import jax
import jax.numpy as jnp

from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Arrays
from mamba_jax.ops.selective_scan.pallas_gpu.time_loop import TimeLoop


def segment_starts(
    ends: Arrays, initial_ben: jax.Array, inputs: Arrays, loop: TimeLoop
) -> jax.Array:
    """Returns the state before each segment (b, s, e, n), given ``forward.ends``."""
    decay_bsen = _decays(ends, inputs, loop, first=0)
    states = [initial_ben]
    for s in range(loop.segments - 1):
        states.append(decay_bsen[:, s] * states[-1] + ends["end"][:, s])
    return jnp.stack(states, axis=1)


def segment_edges(ends: Arrays, final_ben: jax.Array, inputs: Arrays, loop: TimeLoop) -> jax.Array:
    """Returns the gradient of the state after each segment (b, s, e, n), given ``backward.ends``.

    ``final_ben`` is the gradient of the final state.
    """
    decay_bsen = _decays(ends, inputs, loop, first=1)
    gradients = [final_ben]
    for s in reversed(range(loop.segments - 1)):
        gradients.append(decay_bsen[:, s] * gradients[-1] + ends["end"][:, s])
    return jnp.stack(gradients[::-1], axis=1)


def _decays(ends: Arrays, inputs: Arrays, loop: TimeLoop, first: int) -> jax.Array:
    """Π a of the segments from ``first`` on but one; 0 for those with a reset in them."""
    span = ends["span"]
    if span.ndim == 4:  # of signed decays, and a reset's is 0
        return span
    decay_bsen = jnp.exp(span[..., None] * inputs["A"])
    if "drop" not in inputs:
        return decay_bsen
    size, count = loop.segment_tokens, loop.segments - 1
    drop_bt = inputs["drop"]
    spare = max(0, (first + count) * size - drop_bt.shape[1])  # the last segment may be shorter
    drop_bt = jnp.pad(drop_bt, ((0, 0), (0, spare)))[:, first * size : (first + count) * size]
    dropped_bs = drop_bt.reshape(-1, count, size).min(-1) < 0
    return jnp.where(dropped_bs[:, :, None, None], 0, decay_bsen)
