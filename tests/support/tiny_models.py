"""Tiny models to evaluate, whose vocabulary is larger than the tokenizer's."""

import dataclasses
import functools

from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.evaluating.scorer import Model
from tests.support.made import random_params
from tests.support.tiny import HYBRID, MAMBA

TOKENIZER = load_tokenizer("bytes")
# Seven ids more than the tokenizer has, as a padded vocabulary would have.
CONFIGS = {
    config.family: dataclasses.replace(
        config, vocab_size=TOKENIZER.vocab_size + 7, tie_embeddings=False
    )
    for config in (MAMBA, dataclasses.replace(HYBRID, attention_scales=(1, 4)))
}


@functools.cache
def model_of(family, seed=0):
    params = random_params(CONFIGS[family], seed)
    params["lm_head"]["kernel"][TOKENIZER.vocab_size :] *= 10  # ids that would often be chosen
    return Model(params, CONFIGS[family], TOKENIZER)
