"""A plain Transformer in JAX, shaped like GPT-2, with the parameter count of a given Mamba.

Pre-norm layers of causal attention (``jax.nn.dot_product_attention``; cuDNN's on a GPU) and an MLP
with GELU, biases, tied embeddings. Positions are a fixed sinusoidal table, so that the number of
parameters does not depend on the length. Loss, optimizer and clipping are ours.

Legend: b batch, t time, d width, h heads, p head size, v vocabulary, l layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.harness import Context, Prepared
from mamba_jax.config import ModelConfig, TrainingConfig
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.ops.cross_entropy import weighted_cross_entropy
from mamba_jax.training.loss import default_chunk_tokens
from mamba_jax.training.optimizer import make_optimizer

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """The structure of the Transformer."""

    d_model: int
    n_layers: int
    d_ff: int
    vocab_size: int
    head_size: int
    dtype: Any  # of matmuls
    cudnn: bool
    remat: bool


def config_like(model: ModelConfig, context: Context, *, remat: bool) -> Gpt2Config:
    """Same width as the Mamba, a number of layers near GPT-2's shape, the MLP as wide as needed."""
    d, wanted = model.d_model, parameter_count(model).non_embedding - 2 * model.d_model
    n_layers = max(1, round(wanted / (12 * d * d)))
    # A layer: 4 d² + 4 d of attention, 2 d f + f + d of the MLP, 4 d of two norms.
    d_ff = round((wanted / n_layers - 4 * d * d - 9 * d) / (2 * d + 1) / 8) * 8
    on_gpu = context.platform == "gpu"
    dtype = jnp.float32 if context.platform == "cpu" else jnp.bfloat16
    return Gpt2Config(d, n_layers, d_ff, model.vocab_size, model.head_size, dtype, on_gpu, remat)


def init(config: Gpt2Config, key: jax.Array) -> Params:
    """Makes float32 parameters; those of the layers carry a leading layer axis."""
    d, f, n_layers = config.d_model, config.d_ff, config.n_layers
    keys = iter(jax.random.split(key, 5))
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    zeros, ones = (lambda *shape: jnp.zeros((n_layers, *shape))), jnp.ones((n_layers, d))
    layers = {
        "qkv": {"kernel": normal(n_layers, d, 3 * d), "bias": zeros(3 * d)},
        "out": {"kernel": normal(n_layers, d, d), "bias": zeros(d)},
        "up": {"kernel": normal(n_layers, d, f), "bias": zeros(f)},
        "down": {"kernel": normal(n_layers, f, d), "bias": zeros(d)},
        "norm_1": {"scale": ones, "bias": zeros(d)},
        "norm_2": {"scale": ones, "bias": zeros(d)},
    }
    return {
        "embedding": normal(config.vocab_size, d),
        "layers": layers,
        "norm_f": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
    }


def forward(
    params: Params,
    config: Gpt2Config,
    tokens_bt: jax.Array,
    segment_ids_bt: jax.Array | None = None,
) -> jax.Array:
    """Returns x_btd, float32, after the final norm; nothing is read across segments."""
    mask = None
    if segment_ids_bt is not None:
        mask = segment_ids_bt[:, None, :, None] == segment_ids_bt[:, None, None, :]

    def layer(x_btd: jax.Array, p: Params) -> tuple[jax.Array, None]:
        qkv = _dense(_norm(x_btd, p["norm_1"]), p["qkv"], config)
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], -1, config.head_size), 3, axis=2)
        read_bthp = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, implementation="cudnn" if config.cudnn else None
        )
        x_btd += _dense(read_bthp.reshape(x_btd.shape), p["out"], config)
        hidden = jax.nn.gelu(_dense(_norm(x_btd, p["norm_2"]), p["up"], config))
        return x_btd + _dense(hidden, p["down"], config), None

    x_btd = params["embedding"][tokens_bt] + _positions(tokens_bt.shape[1], config.d_model)
    # Inside a scan the loop itself keeps XLA from merging the two passes.
    layer = jax.checkpoint(layer, prevent_cse=False) if config.remat else layer
    return _norm(jax.lax.scan(layer, x_btd, params["layers"])[0], params["norm_f"])


def _dense(x: jax.Array, p: Params, config: Gpt2Config) -> jax.Array:
    return x.astype(config.dtype) @ p["kernel"].astype(config.dtype) + p["bias"].astype(
        config.dtype
    )


def _norm(x_btd: jax.Array, p: Params) -> jax.Array:
    mean, variance = x_btd.mean(-1, keepdims=True), x_btd.var(-1, keepdims=True)
    return (x_btd - mean) * jax.lax.rsqrt(variance + 1e-5) * p["scale"] + p["bias"]


def _positions(length: int, d_model: int) -> np.ndarray:
    angle = np.arange(length)[:, None] / 10_000 ** (np.arange(0, d_model, 2) / d_model)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def prepare_train_step(config: Gpt2Config, windows: np.ndarray) -> Prepared:
    """One step of AdamW on the mean loss, with the same loss as ours.

    Args:
      config: the structure.
      windows: int32 (b, t + 1).
    """
    training = TrainingConfig()
    optimizer = make_optimizer(training)

    def loss(params: Params, windows: jax.Array) -> jax.Array:
        x_nd = forward(params, config, windows[:, :-1]).reshape(-1, config.d_model)
        return weighted_cross_entropy(
            x_nd,
            params["embedding"],
            windows[:, 1:].reshape(-1),
            jnp.full(len(x_nd), 1 / len(x_nd)),
            chunk_tokens=default_chunk_tokens(),
            dtype=config.dtype,
        )

    def step(state: Any, windows: jax.Array) -> Any:
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, windows)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = jax.tree.map(lambda p, update: p - 1e-6 * update, params, updates)
        return (params, opt_state), value

    params = jax.jit(lambda: init(config, jax.random.key(0)))()
    state, tokens = (params, optimizer.init(params)), jnp.asarray(windows)
    program, memory = harness.compiled(step, state, tokens, donate_argnums=0)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))

    def run() -> None:
        nonlocal state
        state, value = program(state, tokens)
        jax.block_until_ready((state, value))

    return Prepared(run, lambda: memory, {"parameters": count})
