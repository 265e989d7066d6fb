"""One layer of each family: the unit that is stacked and scanned.

Legend: b batch, t time, d d_model, k recursion steps, g gate deciles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.config import ModelConfig
from mamba_jax.modules.fusion import Fusion
from mamba_jax.modules.hierarchical_attention import HierarchicalAttention
from mamba_jax.modules.layout import Blocks, Documents
from mamba_jax.modules.mamba import MambaMixer
from mamba_jax.modules.norm import RMSNorm
from mamba_jax.modules.recursion import RecursiveProcessor

GATE_BINS = 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """What every layer of one forward pass shares about its row."""

    where: Documents
    blocks: tuple[Blocks, ...]  # one per attention scale
    active_b: jax.Array | None = None  # bool, rows whose results are used; None: all


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key (evaluation) or at rate 0."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


class MambaBlock(nnx.Module):
    """``x + mixer(norm(x))`` with the residual stream in float32."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.rate = config.dropout
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config, dtype, rngs=rngs)

    def mix(
        self, x_btd: jax.Array, layout: Layout, cache: Any, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mixer's contribution (b, t, d) float32 and its cache."""
        with jax.named_scope("mixer"):
            m_btd, cache = self.mixer(self.norm(x_btd).astype(self.dtype), layout.where, cache)
        return dropout(m_btd.astype(jnp.float32), self.rate, key), cache

    def __call__(
        self, x_btd: jax.Array, layout: Layout, cache: Any, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Applies the layer.

        Args:
          x_btd: float32 residual stream.
          layout: the documents and blocks of the row.
          cache: this layer's cache before the row; None: every document starts in the row.
          key: of this layer's dropout; None: no dropout.

        Returns:
          The new stream, what to report of the layer, and its cache after the row.
        """
        m_btd, cache = self.mix(x_btd, layout, cache, key)
        return x_btd + m_btd, {}, cache

    def observe(self, x_btd: jax.Array, layout: Layout) -> dict[str, jax.Array]:
        """Measures the layer's Δ over the tokens, and the range of its A; float32 scalars."""
        u_btd = self.norm(x_btd).astype(self.dtype)
        dt_bte = self.mixer.step_sizes(u_btd, layout.where)
        A_en = -jnp.exp(self.mixer.A_log[...])
        return {
            "dt_mean": dt_bte.mean(),
            "dt_max": dt_bte.max(),
            "A_min": A_en.min(),
            "A_max": A_en.max(),
        }


class HybridBlock(MambaBlock):
    """A Mamba mixer, then the recursion, hierarchical attention and their fusion.

    m = mixer(norm(x));  h = x + m
    s_K = recursion from s_0 = h (reading attention at each step, if so configured)
    r = s_K - h (+ attention(s_K), if that comes after);  x' = fusion(h, m, r)
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs=rngs)
        recursive, attentive = config.recursion_depth > 0, bool(config.attention_scales)
        self.reads_inside = recursive and attentive and config.recursion_reads_attention
        self.recursion = RecursiveProcessor(config, dtype, rngs=rngs) if recursive else None
        self.attention = HierarchicalAttention(config, dtype, rngs=rngs) if attentive else None
        self.fusion = Fusion(config, dtype, rngs=rngs) if config.fusion != "sum" else None

    def __call__(
        self, x_btd: jax.Array, layout: Layout, cache: Any, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """See ``MambaBlock``; reports the depth gates of the layer."""
        mixer_key, fusion_key = (None, None) if key is None else jax.random.split(key)
        m_btd, new_cache = self.mix(x_btd, layout, cache, mixer_key)
        h_btd = s_btd = x_btd + m_btd
        report: dict[str, jax.Array] = {}

        read = None
        if self.attention is not None and self.reads_inside:
            memories, remembered = self.attention.remember(
                h_btd, layout.where, layout.blocks, cache
            )
            new_cache |= remembered
            read = self.attention.reader(memories)
        if self.recursion is not None:
            s_btd, gates_kbt = self.recursion(h_btd, read, layout.active_b)
            report = report_gates(gates_kbt)
        r_btd = s_btd - h_btd
        if self.attention is not None and not self.reads_inside:
            memories, remembered = self.attention.remember(
                s_btd, layout.where, layout.blocks, cache
            )
            new_cache |= remembered
            r_btd = r_btd + self.attention.reader(memories)(s_btd)

        r_btd = dropout(r_btd, self.rate, fusion_key)
        if self.fusion is None:
            return h_btd + r_btd, report, new_cache
        return self.fusion(h_btd, m_btd, r_btd), report, new_cache


def report_gates(gates_kbt: jax.Array) -> dict[str, jax.Array]:
    """Summarises depth gates: mean per step, share of tokens per decile, mean depth (their sum)."""
    gates_kbt = jax.lax.stop_gradient(gates_kbt)
    decile = jnp.clip((gates_kbt * GATE_BINS).astype(jnp.int32), 0, GATE_BINS - 1)
    histogram_kg = jnp.stack([jnp.mean(decile == g, axis=(1, 2)) for g in range(GATE_BINS)], axis=1)
    mean_k = jnp.mean(gates_kbt, axis=(1, 2))
    return {"gate_mean": mean_k, "gate_histogram": histogram_kg, "depth_mean": mean_k.sum()}
