"""Attention over the sequence at several pooling scales, causal and of linear cost.

At scale s the keys and values are means over completed blocks of s tokens. Queries are never
pooled: each token reads, at every scale, the newest ``window`` completed blocks of its document.
Projecting before pooling gives the same keys and values as projecting after (the projection is
linear), so that one projection serves all scales. Norm and RoPE come after the pooling: pooling
shrinks norms and does not commute with rotation.

Pooling the queries too, and repeating the result for each token of a block, would show a token its
block's future. The scales are mixed by learned weights per head.

Legend: b batch, t time, d d_model, h heads, p head size, c blocks, w window, s scales.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.config import ModelConfig
from mamba_jax.modules.layout import Blocks, Documents
from mamba_jax.modules.mamba import uniform_fan_in
from mamba_jax.modules.norm import RMSNorm
from mamba_jax.ops.windowed_attention import ring_attention, ring_numbers, windowed_attention

ROPE_BASE = 10_000.0  # arXiv 2104.09864, section 3.2.2


def rotate(x_bthp: jax.Array, number_bt: jax.Array) -> jax.Array:
    """Rotary position embedding of block numbers, in float32 (arXiv 2104.09864)."""
    half = x_bthp.shape[-1] // 2
    frequency = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = number_bt[..., None, None].astype(jnp.float32) * frequency
    a, b = x_bthp[..., :half], x_bthp[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What queries read at one scale: ``offset`` remembered blocks, then those of the row.

    When decoding (``newest_b`` is not None) it is the ring itself, the token's own block included.
    """

    k: jax.Array  # (b, c, h, p), or a ring, (b, h, w, p)
    v: jax.Array
    offset: int
    blocks: Blocks
    newest_b: jax.Array | None = None  # the number of the newest block in its document


class HierarchicalAttention(nnx.Module):
    """Windowed attention at every scale with shared projections."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        d, h, p = config.d_model, config.n_heads, config.head_size
        self.scales = config.attention_scales
        self.window = config.resolved_attention_window
        self.dtype = dtype
        self.norm = RMSNorm(d, config.norm_eps)
        self.qkv = nnx.LinearGeneral(
            d, (3, h, p), use_bias=False, dtype=dtype, kernel_init=uniform_fan_in(d), rngs=rngs
        )
        self.query_norm = RMSNorm(p, config.norm_eps)
        self.key_norm = RMSNorm(p, config.norm_eps)
        self.scale_logits = nnx.Param(jnp.zeros((len(self.scales), h), jnp.float32))
        self.o_proj = nnx.LinearGeneral(
            (h, p),
            d,
            axis=(-2, -1),
            use_bias=False,
            dtype=dtype,
            kernel_init=uniform_fan_in(d, config.n_layers**-0.5),
            rngs=rngs,
        )

    @jax.named_scope("attention_memory")
    def remember(
        self,
        x_btd: jax.Array,
        where: Documents,
        layouts: tuple[Blocks, ...],
        cache: dict[str, jax.Array] | None,
    ) -> tuple[list[Memory], dict[str, jax.Array]]:
        """Makes keys and values of every scale.

        Args:
          x_btd: float32 residual stream.
          where: the documents of the row.
          layouts: the blocks of each scale.
          cache: per scale s ``keys_s``, ``values_s`` (b, h, w, p), rings of the newest blocks
            (block i of a document in slot i mod w), and for s > 1 ``partial_s`` (b, 2, h, p)
            float32, the sums of k and v over the tokens of the incomplete block.

        Returns:
          One memory per scale, and the cache after the row.
        """
        kv = jnp.einsum(
            "btd,dmhp->btmhp",
            self.norm(x_btd).astype(self.dtype),
            self.qkv.kernel[:, 1:].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        memories, new_cache = [], {}
        for scale, layout in zip(self.scales, layouts, strict=True):
            pooled, partial = pool(
                kv, where, layout, scale, None if cache is None else cache.get(f"partial_{scale}")
            )
            k = rotate(self.key_norm(pooled[:, :, 0]), layout.number_bc).astype(self.dtype)
            v = pooled[:, :, 1].astype(self.dtype)
            if scale > 1:
                new_cache[f"partial_{scale}"] = partial
            names = [f"{of}_{scale}" for of in ("keys", "values")]
            newest_b = where.next_position_b // scale - 1
            offset = 0 if cache is None else self.window
            if cache is not None and x_btd.shape[1] == 1:
                k, v = (
                    write(cache[name], x[:, 0], newest_b, layout.count_b > 0)
                    for name, x in zip(names, (k, v), strict=True)
                )
                memory, rings = Memory(k, v, offset, layout, newest_b), [k, v]
            else:
                if cache is not None:
                    before_b = where.position_bt[:, 0] // scale - 1
                    k, v = (
                        jnp.concatenate([unroll(cache[name], before_b).astype(x.dtype), x], axis=1)
                        for name, x in zip(names, (k, v), strict=True)
                    )
                memory = Memory(k, v, offset, layout)
                rings = [roll(x, layout.count_b + offset, newest_b, self.window) for x in (k, v)]
            new_cache |= zip(names, rings, strict=True)
            memories.append(memory)
        return memories, new_cache

    def reader(self, memories: list[Memory]) -> Callable[[jax.Array], jax.Array]:
        """Returns a function that reads every scale for each token: (b, t, d) float32 in and out.

        The queries' kernel is cut out here, so that a loop around the reading adds up the gradient
        of that third of ``qkv`` alone. It is cast inside: XLA takes the cast out of the loop, and
        the gradients of its steps are added in float32.
        """
        return functools.partial(self._read, self.qkv.kernel[:, 0], memories)

    @jax.named_scope("attention_read")
    def _read(self, kernel_dhp: jax.Array, memories: list[Memory], x_btd: jax.Array) -> jax.Array:
        q = jnp.einsum(
            "btd,dhp->bthp",
            self.norm(x_btd).astype(self.dtype),
            kernel_dhp.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        q = self.query_norm(q)
        mix = jax.nn.softmax(self.scale_logits[...], axis=0) * len(self.scales)
        y_bthp = jnp.zeros(q.shape, jnp.float32)
        for index, (scale, memory) in enumerate(zip(self.scales, memories, strict=True)):
            layout = memory.blocks
            rotated = rotate(q, layout.query_number_bt).astype(self.dtype)
            keys_and_values = memory.k, memory.v
            if memory.newest_b is not None:
                y = ring_attention(rotated[:, 0], *keys_and_values, memory.newest_b)[:, None]
            else:
                high_bt = layout.newest_bt + memory.offset
                low_bt = jnp.maximum(layout.first_bt + memory.offset, high_bt - self.window + 1)
                y = windowed_attention(
                    rotated, *keys_and_values, low_bt, high_bt, self.window, scale
                )
            y_bthp = y_bthp + mix[index][:, None] * y.astype(jnp.float32)
        return self.o_proj(y_bthp.astype(self.dtype)).astype(jnp.float32)


def pool(
    x_btmhp: jax.Array,
    where: Documents,
    layout: Blocks,
    scale: int,
    partial_bmhp: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Means over the blocks that complete in the row, and the sums of the one left incomplete.

    Args:
      x_btmhp: float32 values.
      where: the documents of the row.
      layout: the blocks of this scale.
      scale: tokens in a block.
      partial_bmhp: sums over the tokens of an incomplete block before the row.

    Returns:
      (b, c, m, h, p) means; slots beyond ``layout.count_b`` are unused. And (b, m, h, p)
      sums over the incomplete block at the row's end.
    """
    if scale == 1:
        return x_btmhp, jnp.zeros_like(x_btmhp[:, 0])
    t = x_btmhp.shape[1]
    shifted = lambda back: jnp.pad(x_btmhp, ((0, 0), (back, 0)) + ((0, 0),) * 3)[:, :t]
    window_sum = sum(shifted(back) for back in range(1, scale)) + x_btmhp
    block_sum = jnp.take_along_axis(window_sum, layout.end_bc[:, :, None, None, None], axis=1)
    left_b = where.next_position_b % scale  # tokens in the incomplete block at the row's end
    tail = jnp.zeros_like(x_btmhp[:, 0])
    for back in range(min(scale - 1, t)):
        mine = (back < left_b)[:, None, None, None]
        tail = tail + jnp.where(mine, x_btmhp[:, t - 1 - back], 0)
    if partial_bmhp is not None:
        begun_before = layout.end_bc[:, 0] < scale - 1
        carried = jnp.where(begun_before[:, None, None, None], partial_bmhp, 0)
        block_sum = block_sum.at[:, 0].add(carried)
        tail = tail + jnp.where((left_b > t)[:, None, None, None], partial_bmhp, 0)
    return block_sum / scale, tail


def write(
    ring_bhwp: jax.Array, x_bhp: jax.Array, newest_b: jax.Array, done_b: jax.Array
) -> jax.Array:
    """Puts block ``newest_b`` into its slot where it is done: in place, in a decoding loop."""
    row_b = jnp.arange(len(newest_b))
    slot_b = newest_b % ring_bhwp.shape[2]
    kept_bhp = ring_bhwp[row_b, :, slot_b]
    x_bhp = jnp.where(done_b[:, None, None], x_bhp.astype(ring_bhwp.dtype), kept_bhp)
    return ring_bhwp.at[row_b, :, slot_b].set(x_bhp)


def unroll(ring_bhwp: jax.Array, newest_b: jax.Array) -> jax.Array:
    """Returns the blocks of a ring, (b, w, h, p), oldest first, the newest last."""
    window = ring_bhwp.shape[2]
    slot_bw = (newest_b[:, None] + 1 + jnp.arange(window)) % window
    return jnp.take_along_axis(ring_bhwp.swapaxes(1, 2), slot_bw[:, :, None, None], axis=1)


def roll(x_bchp: jax.Array, count_b: jax.Array, newest_b: jax.Array, window: int) -> jax.Array:
    """Puts the newest blocks of the last document into a ring, (b, h, w, p); free slots are zero.

    Args:
      x_bchp: blocks in order; ``count_b`` of the slots are real.
      count_b: slot ``count_b - 1`` holds the newest.
      newest_b: its number in the document; -1: the document has none.
      window: slots of the ring.
    """
    number_bw = ring_numbers(newest_b, window)
    index_bw = count_b[:, None] - 1 - (newest_b[:, None] - number_bw)
    ring = jnp.take_along_axis(x_bchp, jnp.maximum(index_bw, 0)[:, :, None, None], axis=1)
    return jnp.where((number_bw >= 0)[:, :, None, None], ring, 0).swapaxes(1, 2)
