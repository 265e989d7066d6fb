"""AdamW with clipping, and the names of the parameters that decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mamba_jax.config import TrainingConfig

# By name, because the shape does not tell: stacked layers give a norm's scale two axes, and A_log
# has two of its own. A_log and D are not matrices: decaying them would pull the time constants of
# the state towards one value (they carry `_no_weight_decay` in the official Mamba as well).
DECAYED = ("embedding", "kernel")
NOT_DECAYED = (
    "scale",  # of norms: final, layer, query, key, fusion; of the depth gate by channel
    "bias",  # of conv1d, dt_proj and the depth gate
    "A_log",
    "D",
    "scale_logits",  # the mixture over attention scales
    "pass_embedding",  # added to an input, as a bias is
)


def decay_mask(params: Any) -> Any:
    """Returns the tree of bools: does weight decay apply to this parameter?

    Args:
      params: nested dict; the last name of a path decides.

    Raises:
      ValueError: if a name is in neither ``DECAYED`` nor ``NOT_DECAYED``.
    """

    def decays(path: tuple, _: Any) -> bool:
        name = path[-1].key
        if name not in DECAYED + NOT_DECAYED:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"does {where} decay? enter {name!r} in DECAYED or NOT_DECAYED")
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW's direction, to be multiplied by −(learning rate) and added to the parameters.

    The gradient g is clipped to the global norm c first: g ← g · min(1, c / |g|). Then with
    m, v the bias-corrected moments and λ the decay::

        update = m / (√v + ε) + λ · param        (λ only where ``decay_mask`` says so)

    The learning rate stays outside so that it follows the step and not the number of accepted
    updates, and so that no second counter has to be kept in the state. Moments are float32.

    Source: arXiv 1711.05101, algorithm 2.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        optax.scale_by_adam(config.beta1, config.beta2, config.adam_eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )
