"""Attention over pooled blocks at several scales as nodes of an ONNX graph; memory linear in time.

The maths is that of ``modules.hierarchical_attention``. A row is one document, so blocks are at the
same positions in every row: what depends only on positions is computed once for all layers.

Legend: b batch, t time, d d_model, h heads, p head size, s tokens of a block, c blocks, w window,
u chunks of queries, q queries of a chunk, n keys that a chunk reads.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.exporting.onnx_graph import Graph
from mamba_jax.exporting.onnx_layers import F, at, norm

ROPE_BASE = 10_000.0
_FAR = F(-1e30)  # used instead of -inf, which would make NaN where nothing is seen


class _Angle(NamedTuple):
    cos: str
    sin: str


class _Memory(NamedTuple):
    keys: str  # (b, …, h, n, p)
    values: str


class Attention(abc.ABC):
    """What all layers share, and the parts that a whole row and a single token have in common.

    Queries are (b, …, h, q, p): of chunks for a row, (b, h, 1, p) for a token.
    """

    swap: tuple[int, ...]  # a permutation: keys' last two axes

    def __init__(self, g: Graph, config: ModelConfig):
        self.config = config
        half = config.head_size // 2
        # By JAX: with differently rounded powers, angles would drift from ours as block numbers
        # grow.
        self._frequency = np.asarray(ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half))
        self._angles: dict[int, _Angle] = {}  # of queries, to multiply (…, 1, q, p / 2)
        self._far: dict[int, str] = {}  # (…, 1, q, n) 0 where a key is seen, else _FAR
        self._any: dict[int, str] = {}  # (…, 1, q, 1) 1 where any key is seen, else 0

    def reader(
        self, g: Graph, layer: str, x: str, past: dict[str, str]
    ) -> tuple[Callable[[Graph, str], str], dict[str, str]]:
        """Stores keys and values of a stream (b, t, d).

        Returns:
          A function that adds attention for another stream (b, t, d) to a graph, and the layer's
          new cache.
        """
        part, d = f"{layer}attention.", self.config.d_model
        u = norm(g, x, f"{part}norm.weight", self.config.norm_eps)
        kv = g("MatMul", u, g.factor(f"{part}qkv.weight", slice(d, None)))
        memories, present = {}, {}
        for scale in self.config.attention_scales:
            memories[scale], cache = self._remember(g, part, kv, scale, past)
            present |= cache
        mix = g("Softmax", g.weight(f"{part}scale_logits"), axis=0)
        mix = g("Reshape", mix, at(len(memories), -1, 1, 1))
        mix = g("Mul", mix, F(len(memories)))
        mixes = [g("Gather", mix, np.int64(i), axis=0) for i in range(len(memories))]
        return lambda g, x: self._read(g, part, x, memories, mixes), present

    @abc.abstractmethod
    def _remember(
        self, g: Graph, part: str, kv: str, scale: int, past: dict[str, str]
    ) -> tuple[_Memory, dict[str, str]]:
        """Makes one scale's memory of keys and values (b, t, 2d), and its new cache."""

    @abc.abstractmethod
    def _chunked(self, g: Graph, x: str) -> str:
        """(b, t, d) → queries."""

    @abc.abstractmethod
    def _joined(self, g: Graph, x: str) -> str:
        """Queries → (b, t, d)."""

    def _read(
        self, g: Graph, part: str, x: str, memories: dict[int, _Memory], mixes: list[str]
    ) -> str:
        d, eps = self.config.d_model, self.config.norm_eps
        x = norm(g, x, f"{part}norm.weight", eps)
        q = self._chunked(g, g("MatMul", x, g.factor(f"{part}qkv.weight", slice(0, d))))
        q = norm(g, q, f"{part}query_norm.weight", eps)
        q = g("Mul", q, F(self.config.head_size**-0.5))
        parts = []
        for (scale, memory), mix in zip(memories.items(), mixes, strict=True):
            # Next to the product, so that a runtime can read keys in place.
            keys = g("Transpose", memory.keys, perm=self.swap)
            scores = g("MatMul", rotate(g, q, self._angles[scale]), keys)
            weights = g("Softmax", g("Add", scores, self._far[scale]), axis=-1)
            y = g("MatMul", weights, memory.values)
            parts.append(g("Mul", y, g("Mul", mix, self._any[scale])))
        y = self._joined(g, g("Sum", *parts))
        return g("MatMul", y, g.factor(f"{part}o_proj.weight"))

    def _angle(self, g: Graph, number: str, *axes: int) -> _Angle:
        """Turns block numbers into angles, with further axes of size 1 and a last one of p / 2."""
        number = g("Cast", g("Unsqueeze", number, at(*axes, -1)), to=g.onnx.TensorProto.FLOAT)
        angle = g("Mul", number, self._frequency)
        return _Angle(g("Cos", angle), g("Sin", angle))

    def _see(self, g: Graph, scale: int, seen: str) -> None:
        """Records what the queries of a scale see, (…, 1, q, n) bool."""
        self._far[scale] = g("Where", seen, F(0), _FAR)
        number = g("Cast", seen, to=g.onnx.TensorProto.FLOAT)
        self._any[scale] = g("ReduceMax", number, at(-1), keepdims=1)


class RowAttention(Attention):
    """Attention of a whole row without a cache: a chunk of queries attends to one band of keys."""

    swap = (0, 1, 2, 4, 3)

    def __init__(self, g: Graph, config: ModelConfig, ids: str):
        super().__init__(g, config)
        window = config.resolved_attention_window
        self._length = g("Shape", ids, start=1, end=2)
        t = g("Squeeze", self._length)
        chunk = g("Min", t, np.int64(window))
        first_u = g("Range", np.int64(0), t, chunk)
        within_q = g("Range", np.int64(0), chunk, np.int64(1))
        # Beyond the row's end the last query is repeated, and cut off again in the end.
        token_uq = g("Add", g("Unsqueeze", first_u, at(1)), within_q)
        self._token_uq = token_uq = g("Min", token_uq, g("Sub", t, np.int64(1)))
        slot_w = np.arange(window)
        self._bands: dict[int, str] = {}  # (u, n) the keys that a chunk reads
        self._rings: dict[int, tuple[str, str]] = {}  # (w) blocks, and 1 where there is one
        self._block_angles: dict[int, _Angle] = {}  # to multiply (b, c, h, p / 2)
        self._open: dict[int, str] = {}  # 1 if the row ends inside a block, else 0
        self._padding: dict[int, str] = {}  # up to a whole number of blocks
        as_float = lambda x: g("Cast", x, to=g.onnx.TensorProto.FLOAT)
        for scale in config.attention_scales:
            size = np.int64(scale)
            done = g("Div", t, size)  # blocks; one more may be open
            slots = g("Div", g("Add", t, np.int64(scale - 1)), size)
            left = g("Sub", t, g("Mul", done, size))
            self._open[scale] = as_float(g("Greater", left, np.int64(0)))
            missing = g("Sub", g("Mul", slots, size), self._length)
            self._padding[scale] = g("Concat", at(0, 0, 0, 0), missing, at(0), axis=0)
            number_c = g("Range", np.int64(0), slots, np.int64(1))
            self._block_angles[scale] = self._angle(g, number_c, 1)

            newest = g("Sub", done, np.int64(1))
            number_w = ring_numbers(g, newest, slot_w)
            there_w = as_float(g("GreaterOrEqual", number_w, np.int64(0)))
            there = g("Unsqueeze", there_w, at(1, 2))
            self._rings[scale] = g("Max", number_w, np.int64(0)), there

            newest_uq = newest_block(g, token_uq, scale)
            self._angles[scale] = self._angle(g, g("Unsqueeze", newest_uq, at(1)))
            band = g("Add", g("Div", g("Add", chunk, np.int64(scale - 1)), size), np.int64(window))
            start_u = g("Sub", newest_block(g, first_u, scale), np.int64(window - 1))
            number_un = g("Range", np.int64(0), band, np.int64(1))
            number_un = g("Add", g("Unsqueeze", start_u, at(1)), number_un)
            last = g("Sub", slots, np.int64(1))
            self._bands[scale] = g("Min", g("Max", number_un, np.int64(0)), last)
            number = g("Unsqueeze", number_un, at(1, 2))
            behind = g("Sub", g("Unsqueeze", newest_uq, at(1, 3)), number)  # (u, 1, q, n)
            recent = g("Less", behind, np.int64(window))
            seen = g("And", recent, g("GreaterOrEqual", behind, np.int64(0)))
            self._see(g, scale, g("And", seen, g("GreaterOrEqual", number, np.int64(0))))

    def _remember(
        self, g: Graph, part: str, kv: str, scale: int, past: dict[str, str]
    ) -> tuple[_Memory, dict[str, str]]:
        h, p = self.config.n_heads, self.config.head_size
        present = {}
        if scale > 1:
            padded = g("Pad", kv, self._padding[scale])
            blocks = g("Reshape", padded, at(0, -1, scale, 2 * h * p))
            kv = g("ReduceSum", blocks, at(2), keepdims=0)
            last = g("Mul", g("Gather", kv, np.int64(-1), axis=1), self._open[scale])
            present[f"partial_{scale}"] = g("Reshape", last, at(0, 2, h, p))
            kv = g("Div", kv, F(scale))
        split = g("Split", kv, outs=2, axis=2, num_outputs=2)
        k, v = (g("Reshape", x, at(0, -1, h, p)) for x in split)
        k = norm(g, k, f"{part}key_norm.weight", self.config.norm_eps)
        k = rotate(g, k, self._block_angles[scale])
        index, there = self._rings[scale]
        for name, x in (("keys", k), ("values", v)):
            ring = g("Mul", g("Gather", x, index, axis=1), there)
            present[f"{name}_{scale}"] = g("Transpose", ring, perm=[0, 2, 1, 3])
        bands = [g("Gather", x, self._bands[scale], axis=1) for x in (k, v)]  # (b, u, n, h, p)
        return _Memory(*(g("Transpose", x, perm=[0, 1, 3, 2, 4]) for x in bands)), present

    def _chunked(self, g: Graph, x: str) -> str:
        x = g("Reshape", x, at(0, 0, self.config.n_heads, self.config.head_size))
        return g("Transpose", g("Gather", x, self._token_uq, axis=1), perm=[0, 1, 3, 2, 4])

    def _joined(self, g: Graph, x: str) -> str:
        x = g("Transpose", x, perm=[0, 1, 3, 2, 4])  # (b, u, q, h, p)
        x = g("Reshape", x, at(0, -1, self.config.d_model))
        return g("Slice", x, at(0), self._length, at(1))


class TokenAttention(Attention):
    """Attention of one token per row, after ``length`` (b) others, to the cached rings."""

    swap = (0, 1, 3, 2)

    def __init__(self, g: Graph, config: ModelConfig, length: str):
        super().__init__(g, config)
        slot_w = np.arange(config.resolved_attention_window)
        self._done: dict[int, str] = {}  # (b, 1, 1) bool, the token completes a block
        self._slots: dict[int, str] = {}  # (b, h, 3) row, head and slot of that block in its ring
        batch = g("Shape", length)
        row_b = g("Range", np.int64(0), g("Squeeze", batch), np.int64(1))
        head_h = np.arange(config.n_heads)[:, None]
        shape = g("Concat", batch, at(config.n_heads, 1), axis=0)
        for scale in config.attention_scales:
            newest_b = newest_block(g, length, scale)
            after_b = g("Add", length, np.int64(1))
            done_b = g("Equal", g("Mod", after_b, np.int64(scale)), np.int64(0))
            self._done[scale] = g("Unsqueeze", done_b, at(1, 2))
            slot_b = g("Mod", newest_b, np.int64(len(slot_w)))
            place = [g("Unsqueeze", x, at(1, 2)) for x in (row_b, slot_b)]
            place = [g("Expand", x, shape) for x in (place[0], head_h, place[1])]
            self._slots[scale] = g("Concat", *place, axis=2)
            newest_b1 = g("Unsqueeze", newest_b, at(1))
            self._angles[scale] = self._angle(g, newest_b, 1, 2)
            number_bw = ring_numbers(g, newest_b1, slot_w)
            seen_bw = g("GreaterOrEqual", number_bw, np.int64(0))
            self._see(g, scale, g("Unsqueeze", seen_bw, at(1, 2)))

    def _remember(
        self, g: Graph, part: str, kv: str, scale: int, past: dict[str, str]
    ) -> tuple[_Memory, dict[str, str]]:
        h, p = self.config.n_heads, self.config.head_size
        kv = g("Reshape", kv, at(0, 2, h, p))
        present = {}
        if scale > 1:
            kv = g("Add", kv, past[f"partial_{scale}"])
            done = g("Unsqueeze", self._done[scale], at(3))
            present[f"partial_{scale}"] = g("Where", done, F(0), kv)
            kv = g("Div", kv, F(scale))
        k, v = g("Split", kv, outs=2, axis=1, num_outputs=2)
        k = norm(g, k, f"{part}key_norm.weight", self.config.norm_eps)
        k = rotate(g, k, self._angles[scale])
        for name, x in (("keys", k), ("values", v)):
            ring, slot = past[f"{name}_{scale}"], self._slots[scale]
            x = g("Reshape", x, at(0, h, p))
            x = g("Where", self._done[scale], x, g("GatherND", ring, slot))
            present[f"{name}_{scale}"] = g("ScatterND", ring, slot, x)
        return _Memory(present[f"keys_{scale}"], present[f"values_{scale}"]), present

    def _chunked(self, g: Graph, x: str) -> str:
        return g("Reshape", x, at(0, self.config.n_heads, 1, self.config.head_size))

    def _joined(self, g: Graph, x: str) -> str:
        return g("Reshape", x, at(0, 1, self.config.d_model))


def rotate(g: Graph, x: str, angle: _Angle) -> str:
    """Rotary position embedding of the last axis."""
    a, b = g("Split", x, outs=2, axis=-1, num_outputs=2)
    turned_a = g("Sub", g("Mul", a, angle.cos), g("Mul", b, angle.sin))
    turned_b = g("Add", g("Mul", a, angle.sin), g("Mul", b, angle.cos))
    return g("Concat", turned_a, turned_b, axis=-1)


def newest_block(g: Graph, token: str, scale: int) -> str:
    """Returns the number of the newest block that is complete at a token; -1: there is none."""
    blocks = g("Div", g("Add", token, np.int64(1)), np.int64(scale))
    return g("Sub", blocks, np.int64(1))


def ring_numbers(g: Graph, newest: str, slot_w: np.ndarray) -> str:
    """Returns the number of the block in each slot of a ring; negative: the slot is empty."""
    behind = g("Mod", g("Sub", newest, slot_w), np.int64(len(slot_w)))
    return g("Sub", newest, behind)
