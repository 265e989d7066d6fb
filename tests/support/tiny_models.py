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
MODELS = CONFIGS | {
    "hybrid, tokens skip steps": dataclasses.replace(CONFIGS["hybrid"], gate_skip_threshold=0.5)
}


@functools.cache
def model_of(name, seed=0):
    params = random_params(MODELS[name], seed)
    params["lm_head"]["kernel"][TOKENIZER.vocab_size :] *= 10  # ids that would often be chosen
    return Model(params, MODELS[name], TOKENIZER)
