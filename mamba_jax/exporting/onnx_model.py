"""The two graphs of a model: a whole row, and one token after what is cached.

Legend: b batch, t time, v ids, l layers; see ``models.build.cache_arrays`` for a cache's axes.
"""

from collections.abc import Mapping

import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.exporting.onnx_attention import RowAttention, TokenAttention
from mamba_jax.exporting.onnx_graph import Graph
from mamba_jax.exporting.onnx_layers import at, fusion, mixer, norm, recursion
from mamba_jax.exporting.tensors import EMBEDDING, HEAD, NORM
from mamba_jax.models import build

BATCH, LENGTH = "batch", "sequence"  # the free axes


def make(table: Mapping[str, np.ndarray], config: ModelConfig, *, one_token: bool) -> Graph:
    """Makes a graph: ``input_ids`` int64 in, ``logits`` float32 (b, t, v) and a cache out.

    The cache is ``present.i.NAME`` for layer i and each of its ``models.build.cache_arrays``, all
    float32, and, if there is attention, ``present.length`` (b) int64, the tokens read.

    Args:
      table: what ``tensors.to_hf`` gave.
      config: of the model.
      one_token: ids are (b, 1) and ``past.…`` is the cache before them; else (b, t), and nothing
        precedes them.

    Raises:
      UserError: if onnx is not installed.
    """
    g = Graph(table)
    length = 1 if one_token else LENGTH
    ids = g.input("input_ids", np.int64, BATCH, length)
    attention, present_length = None, None
    batch = g("Shape", ids, start=0, end=1)
    if config.attends and one_token:
        past_length = g.input("past.length", np.int64, BATCH)
        attention = TokenAttention(g, config, past_length)
        present_length = g("Add", past_length, np.int64(1))
    elif config.attends:
        attention = RowAttention(g, config, ids)
        present_length = g("Expand", g("Shape", ids, start=1, end=2), batch)

    x = g("Gather", g.weight(EMBEDDING), ids)
    for i, kind in enumerate(config.kinds):
        own = config.of_kind(kind)
        shapes = {name: shape for name, (shape, _) in build.cache_arrays(own).items()}
        if one_token:
            past = {
                name: g.input(f"past.{i}.{name}", np.float32, BATCH, *shape)
                for name, shape in shapes.items()
            }
        else:
            past = {
                name: g("Expand", np.float32(0), g("Concat", batch, at(*shapes[name]), axis=0))
                for name in ("conv_state", "ssm_state")
            }
        x, present = _layer(
            g, own, f"backbone.layers.{i}.", x, past, attention if own.attends else None, one_token
        )
        for name, shape in shapes.items():
            g.output(f"present.{i}.{name}", present[name], np.float32, BATCH, *shape)
    if present_length is not None:
        g.output("present.length", present_length, np.int64, BATCH)
    x = norm(g, x, NORM, config.norm_eps)
    logits = _head(g, x, ids, EMBEDDING if config.tie_embeddings else HEAD)
    g.output("logits", logits, np.float32, BATCH, length, len(table[EMBEDDING]))
    g.outputs.insert(0, g.outputs.pop())  # a reader sees these first
    return g


def _head(g: Graph, x: str, ids: str, name: str) -> str:
    """Logits, by a product with the embedding table (v, d) in its stored layout."""
    n_ids, d = g.table[name].shape
    logits = g("Gemm", g("Reshape", x, at(-1, d)), g.weight(name), transB=1)
    return g("Reshape", logits, g("Concat", g("Shape", ids), at(n_ids), axis=0))


def _layer(
    g: Graph,
    config: ModelConfig,
    layer: str,
    x: str,
    past: dict[str, str],
    attention: RowAttention | TokenAttention | None,
    one_token: bool,
) -> tuple[str, dict[str, str]]:
    """One layer, the only kind of ``config``: see ``modules.block``."""
    m, present = mixer(g, config, layer, x, past, one_token)
    h = s = g("Add", x, m)
    if config.family == "mamba":
        return h, present
    recursive = config.recursion_depth > 0
    read = None
    if attention is not None and recursive and config.recursion_reads_attention:
        read, remembered = attention.reader(g, layer, h, past)
        present |= remembered
    if recursive:
        s = recursion(g, config, layer, h, read)
    r = g("Sub", s, h)
    if attention is not None and read is None:
        read_after, remembered = attention.reader(g, layer, s, past)
        present |= remembered
        r = g("Add", r, read_after(g, s))
    return fusion(g, config, layer, h, m, r), present
