"""Ensembles: the mean of several models' probabilities, over one tokenizer's tokens.

Legend: b batch, v vocabulary, m models.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError
from mamba_jax.models import build


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint in memory."""

    params: build.Params
    config: ModelConfig
    tokenizer: Tokenizer


def same_tokenizer(tokenizers: Sequence[Tokenizer]) -> Tokenizer:
    """Returns the tokenizer that all models share.

    Raises:
      UserError: if they differ.
    """
    first, *others = tokenizers
    for other in others:
        if other.identity != first.identity:
            raise UserError(
                "the models of an ensemble need the same tokenizer; these have "
                f"{first.name} and {other.name}"
            )
    return first


def mean_probability(log_probs: list[Float[Array, "*n v"]]) -> Float[Array, "*n v"]:
    """Returns ln of the mean over models of exp(log_probs), float32, safe from underflow."""
    if len(log_probs) == 1:
        return log_probs[0]
    return jax.nn.logsumexp(jnp.stack(log_probs), axis=0) - math.log(len(log_probs))


def mean_logits(each_mbv: Sequence[Float[Array, "b _"]], vocab_size: int) -> Float[Array, "b v"]:
    """Returns logits of the mean of the models' probabilities.

    Args:
      each_mbv: float32 logits of each model, whose vocabularies may be padded differently.
      vocab_size: ids from here up are padding and left out.

    Returns:
      float32 logits: for one model its own, unchanged; for several, ln of the mean probabilities.
    """
    each_mbv = [logits_bv[:, :vocab_size] for logits_bv in each_mbv]
    if len(each_mbv) == 1:
        return each_mbv[0]
    return mean_probability([jax.nn.log_softmax(logits_bv) for logits_bv in each_mbv])
