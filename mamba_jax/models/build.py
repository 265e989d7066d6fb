"""The models as pure functions of a plain nested dict of arrays: the seam between NNX and JAX.

Every other part of the system sees a model only through this file, and does not know which family
it holds. Parameters are float32; those under ``layers`` are stacked as ``models.stacks``
describes, and layers that repeat are scanned, so that compile time does not grow with depth.

Legend: b batch, t time, d d_model, v vocabulary, l layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mamba_jax.config import ModelConfig
from mamba_jax.config.plan import schedule
from mamba_jax.models import stacks
from mamba_jax.models.language_model import BLOCKS, LanguageModel, matmul_dtype
from mamba_jax.modules import layout as layouts
from mamba_jax.modules.block import Layout
from mamba_jax.modules.norm import rms_normalise
from mamba_jax.ops import int8_matmul
from mamba_jax.ops.selective_scan import SAVEABLE

Params = dict[str, Any]
Cache = dict[str, Any]


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
    """Makes the parameters of a model; jit-compatible. ``config.vocab_size`` must be set."""
    model = LanguageModel(config, matmul_dtype(config), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def abstract_params(config: ModelConfig) -> Params:
    """Returns the tree of ``init`` as ``jax.ShapeDtypeStruct``, without allocating."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def forward(
    params: Params,
    config: ModelConfig,
    tokens_bt: Int[Array, "b t"],
    *,
    segment_ids_bt: Int[Array, "b t"] | None = None,
    initial_cache: Cache | None = None,
    dropout_key: PRNGKeyArray | None = None,
    active_b: Bool[Array, " b"] | None = None,
    observing: bool = False,
) -> tuple[Float[Array, "b t d"], dict[str, jax.Array], Cache]:
    """Runs everything before the head.

    Args:
      params: as made by ``init``.
      config: the structure they were made with.
      tokens_bt: int32 token ids.
      segment_ids_bt: ids, equal within a document: every change resets conv, scan state, recursion
        and attention. None: each row is one document. Padding is a document of its own.
      initial_cache: what a previous call returned, to continue its rows: a row's first document is
        continued if its id equals the last one before (or no ids are given).
      dropout_key: None: no dropout.
      active_b: rows whose results are used: with a ``config.gate_skip_threshold`` the others need
        no recursion step. None: all.
      observing: also report each layer's Δ and A; needs a row with nothing before it.

    Returns:
      x_btd: float32, after the final norm.
      aux: float32 by layer, in the order of the plan. For the layers that have gates:
        ``gate_mean`` (l, k), ``gate_histogram`` (l, k, 10), share of tokens per gate decile, and
        ``depth_mean`` (l,), mean sum of the gates. If observing, for all layers, (l,): ``dt_mean``
        and ``dt_max`` of Δ over tokens and channels, ``A_min`` and ``A_max``.
      final_cache: the cache after the last token, of fixed size whatever the length.
    """
    cache, kinds = initial_cache, config.kinds
    where = layouts.documents(
        (tokens_bt.shape[0], tokens_bt.shape[1]),
        segment_ids_bt,
        None if cache is None else cache["segment"],
        None if cache is None else cache["length"],
    )
    scales = config.attention_scales if config.attends else ()
    blocks = tuple(layouts.blocks(where, scale) for scale in scales)
    layout = Layout(where, blocks, active_b)
    dtype = matmul_dtype(config)
    keys = None if dropout_key is None else jax.random.split(dropout_key, config.n_layers)

    def layer(
        kind: str, x_btd: jax.Array, per_layer: tuple[Params, Any, Any]
    ) -> tuple[jax.Array, Any]:
        layer_params, layer_cache, key = per_layer
        block = _bind_block(config.of_kind(kind), dtype, layer_params)
        observed = block.observe(x_btd, layout) if observing else {}
        x_btd, report, layer_cache = block(x_btd, layout, layer_cache, key)
        return x_btd, (report | observed, layer_cache)

    with jax.named_scope("embed"):
        x_btd = params["embed"]["embedding"][tokens_bt]
    caches = None if cache is None else cache["layers"]
    if isinstance(params["layers"], tuple):  # as prepare_for_decoding makes them
        layer_caches = []
        for kind, *own in zip(kinds, params["layers"], caches or (), strict=True):
            x_btd, (_, layer_cache) = layer(kind, x_btd, (*own, None))
            layer_caches.append(layer_cache)
        aux, layer_caches = {}, tuple(layer_caches)
    else:
        caches_of, keys_of = stacks.by_kind(caches, kinds), stacks.sorted_by_kind(keys, kinds)
        x_btd, made = stacks.run(
            lambda kind, looped: _remat(functools.partial(layer, kind), config, looped),
            x_btd,
            {
                kind: (stack, caches_of[kind], keys_of[kind])
                for kind, stack in stacks.by_kind(params["layers"], kinds).items()
            },
            schedule(kinds),
        )
        reports = {kind: report for kind, (report, _) in made.items()}
        aux = {
            name: stacks.in_order({k: r[name] for k, r in reports.items() if name in r}, kinds)
            for name in sorted({name for report in reports.values() for name in report})
        }
        layer_caches = stacks.joined({kind: own for kind, (_, own) in made.items()}, kinds)
    with jax.named_scope("norm_f"):
        x_btd = rms_normalise(x_btd, config.norm_eps) * params["norm_f"]["scale"]
    final_cache = {
        "layers": layer_caches,
        "segment": where.segment_b,
        "length": where.next_position_b,
    }
    return x_btd, aux, final_cache


def head_weight(params: Params, config: ModelConfig) -> Float[Array, "padded_v d"]:
    """Returns the head's matrix: the embedding when tied, unless it was prepared apart.

    It has ``config.padded_vocab_size`` rows, the last of which belong to no token.
    """
    tied = config.tie_embeddings and "lm_head" not in params
    return params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]


def logits(params: Params, config: ModelConfig, x: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
    """Applies the head: a matmul in the matmul dtype, accumulated in float32.

    From int8, as ``prepare_for_decoding`` may make the head, the factors are float32.
    """
    dtype = matmul_dtype(config)
    with jax.named_scope("lm_head"):
        if "int8" in params.get("lm_head", {}):
            y_nv = int8_matmul.matmul(x.reshape(-1, x.shape[-1]), params["lm_head"]["int8"])
            y = y_nv.reshape(*x.shape[:-1], -1)
        else:
            y = jnp.einsum(
                "...d,vd->...v",
                x.astype(dtype),
                head_weight(params, config).astype(dtype),
                preferred_element_type=jnp.float32,
            )
        return y[..., : config.vocab_size]


def apply(
    params: Params,
    config: ModelConfig,
    tokens_bt: Int[Array, "b t"],
    *,
    segment_ids_bt: Int[Array, "b t"] | None = None,
    initial_cache: Cache | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "b t v"], dict[str, jax.Array], Cache]:
    """``forward`` and the head: float32 logits, aux, final cache. Arguments as in ``forward``."""
    x_btd, aux, cache = forward(
        params,
        config,
        tokens_bt,
        segment_ids_bt=segment_ids_bt,
        initial_cache=initial_cache,
        dropout_key=dropout_key,
    )
    return logits(params, config, x_btd), aux, cache


def init_cache(config: ModelConfig, batch_size: int) -> Cache:
    """Makes the cache of empty rows.

    Leaves under ``layers``, stacked as the parameters are, have axes (l, b, …); ``segment`` and
    ``length``, the id and number of tokens of the row's current document, (b,).
    """
    kinds = config.kinds
    layers = {
        kind: {
            name: jnp.zeros((kinds.count(kind), batch_size, *shape), dtype)
            for name, (shape, dtype) in cache_arrays(config.of_kind(kind)).items()
        }
        for kind in sorted(set(kinds))
    }
    counts = {name: jnp.zeros(batch_size, jnp.int32) for name in ("segment", "length")}
    return {"layers": stacks.joined(layers, kinds), **counts}


def cache_arrays(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """Returns name → shape without the batch axis, dtype, of what a layer leaves behind.

    Args:
      config: of the layer's kind alone (``ModelConfig.of_kind``).
    """
    dtype, float32 = matmul_dtype(config), jnp.dtype("float32")
    arrays = {
        "conv_state": ((config.d_conv - 1, config.d_inner), dtype),
        "ssm_state": ((config.d_inner, config.d_state), float32),
    }
    heads, size = config.n_heads, config.head_size
    for scale in config.attention_scales if config.attends else ():
        for of in ("keys", "values"):
            arrays[f"{of}_{scale}"] = ((heads, config.resolved_attention_window, size), dtype)
        if scale > 1:
            arrays[f"partial_{scale}"] = ((2, heads, size), float32)
    return arrays


def prefill(
    params: Params,
    config: ModelConfig,
    tokens_bt: Int[Array, "b t"],
    cache: Cache,
    segment_ids_bt: Int[Array, "b t"] | None = None,
    active_b: Bool[Array, " b"] | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Processes a prompt, or its next chunk, in parallel.

    ``params`` and ``cache`` may both be as ``prepare_for_decoding`` and ``unstack_cache`` make
    them: the same results, faster.

    Returns:
      float32 logits after the last token, and the cache after it.
    """
    x_btd, _, cache = forward(
        params,
        config,
        tokens_bt,
        segment_ids_bt=segment_ids_bt,
        initial_cache=cache,
        active_b=active_b,
    )
    return logits(params, config, x_btd[:, -1]), cache


def decode_step(
    params: Params,
    config: ModelConfig,
    token_b: Int[Array, " b"],
    cache: Cache,
    active_b: Bool[Array, " b"] | None = None,
) -> tuple[Float[Array, "b v"], Cache]:
    """Processes one token per row; time and memory do not depend on the tokens before it.

    ``params`` and ``cache`` are as in ``prefill``, ``active_b`` as in ``forward``.
    """
    return prefill(params, config, token_b[:, None], cache, active_b=active_b)


# Factors of matmuls in the matmul dtype; the kernels of conv and gate stay float32.
_MATMULS = ("in_proj", "x_proj", "dt_proj", "out_proj", "up", "down", "qkv", "o_proj", "proj")


@functools.partial(jax.jit, static_argnames=("config", "int8_head"))
def prepare_for_decoding(params: Params, config: ModelConfig, *, int8_head: bool = False) -> Params:
    """Lays parameters out so that ``prefill`` and ``decode_step`` are fastest; call it once.

    Each layer's parameters become arrays of their own: from stacked ones a step first copies each
    layer out (on a CPU core this took 28% of a token, and a prompt took 1.3 times as long). The
    factors of matrix products are cast to the matmul dtype, the head's included. The embedding
    stays float32: one row of it is read.

    Args:
      params: as made by ``init``.
      config: the structure they were made with.
      int8_head: round the head's rows to int8. On a CPU, where reading the head is most of a small
        model's token, one row decodes 1.5 times as fast (four: no gain); a logit is off by about
        0.7% of a typical one. Only the head: the layers are a fifth of what is read.

    Returns:
      Parameters for the two, ``forward`` and ``apply``, with a cache from ``unstack_cache``; for
      nothing else.
    """
    dtype = matmul_dtype(config)

    def narrow(path: tuple, leaf: jax.Array) -> jax.Array:
        is_factor = path[-1].key == "kernel" and path[-2].key in _MATMULS
        return leaf.astype(dtype) if is_factor else leaf

    layers = jax.tree_util.tree_map_with_path(narrow, params["layers"])
    prepared = params | {"layers": stacks.unstack(layers, config.kinds)}
    if int8_head:
        return prepared | {"lm_head": {"int8": int8_matmul.quantise(head_weight(params, config))}}
    head = {"kernel": head_weight(params, config).astype(dtype)}
    tied_in_float32 = config.tie_embeddings and dtype == jnp.float32
    return prepared if tied_in_float32 else prepared | {"lm_head": head}


def unstack_cache(cache: Cache, config: ModelConfig) -> Cache:
    """Lays a cache of ``init_cache`` or stacked parameters out for prepared ones."""
    return cache | {"layers": stacks.unstack(cache["layers"], config.kinds)}


@functools.lru_cache(maxsize=64)
def _block_template(config: ModelConfig, dtype: jnp.dtype) -> tuple[Any, Any]:
    """Returns the graph definition and abstract state of a layer of ``config``'s only kind."""
    block = nnx.eval_shape(lambda: BLOCKS[config.family](config, dtype, rngs=nnx.Rngs(0)))
    return nnx.split(block)


def _bind_block(config: ModelConfig, dtype: jnp.dtype, layer_params: Params) -> Any:
    """Makes one layer's module hold ``layer_params``; costs trace time only."""
    graph, state = _block_template(config, dtype)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the template stays abstract
    nnx.replace_by_pure_dict(state, layer_params)
    return nnx.merge(graph, state)


def _remat(layer: Any, config: ModelConfig, looped: bool) -> Any:
    """Applies the rematerialisation policy to a layer."""
    policy = config.remat
    if policy == "auto":
        # On CPU "dots" is a tenth faster than "none", and takes a third of its memory: writing
        # what is cheap to recompute costs more than computing it.
        policy = "dots" if jax.default_backend() == "cpu" else "full"
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    saveable = {
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVEABLE)
        ),
        "full": policies.nothing_saveable,
    }[policy]
    # Inside a scan the loop itself keeps XLA from merging the two passes.
    return jax.checkpoint(layer, policy=saveable, prevent_cse=not looped)
