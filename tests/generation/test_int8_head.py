"""The head rounded to int8: near the exact logits, and only where requested."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.generation import check_settings, generate_text
from mamba_jax.models import build
from tests.support.tiny import HYBRID, MAMBA, TOKENS, params_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

SETTINGS: dict[str, Any] = {
    "max_tokens": 4,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
}


@pytest.mark.parametrize(
    ("model", "tied", "n_rows"),
    [(MAMBA, True, 1), (MAMBA, False, 2), (HYBRID, True, 2)],
    ids=["tied, one row", "untied, two rows", "hybrid"],
)
def test_logits_are_within_the_rounding_of_the_head(model, tied, n_rows):
    config = dataclasses.replace(model, tie_embeddings=tied)
    params = jax.jit(params_of, static_argnums=0)(config)
    exact = build.prepare_for_decoding(params, config)
    rounded = build.prepare_for_decoding(params, config, int8_head=True)
    step = jax.jit(build.decode_step, static_argnames="config")
    hidden = jax.jit(build.forward, static_argnames="config")
    tokens = TOKENS[:n_rows]
    cache = build.unstack_cache(build.init_cache(config, n_rows), config)
    head = np.asarray(build.head_weight(params, config), np.float64)
    half_scale_v = np.abs(head).max(axis=1) / 127 / 2
    for t in range(5):
        x_btd, _, _ = hidden(exact, config, tokens[:, t : t + 1], initial_cache=cache)
        logits, same_cache = step(rounded, config, tokens[:, t], cache)
        truth, cache = step(exact, config, tokens[:, t], cache)
        jax.tree.map(np.testing.assert_array_equal, same_cache, cache)  # the head ends a step
        # Each of the head's numbers is off by half its row's scale at most; the rest is float32
        # rounding, far below 1% of that.
        error = np.abs(np.asarray(logits, np.float64) - truth)
        bound = np.abs(np.asarray(x_btd[:, 0], np.float64)).sum(axis=-1)[:, None] * half_scale_v
        assert (error <= 1.01 * bound).all()
        # The errors have random signs: scale/√12 of ±2 to 3 σ in 127 steps is 0.5% to 0.8%.
        assert 1e-4 < np.linalg.norm(error) / np.linalg.norm(truth) < 0.015


@pytest.mark.parametrize(("head", "n_padding"), [("exact", 5), ("int8", 4)])
def test_logits_come_from_the_requested_head(head, n_padding, monkeypatch):
    """By what the head holds when logits are traced: those of the prompt, then of each token."""
    tokenizer = load_tokenizer("bytes")
    # Sizes that no other test has, as what is compiled already is not traced again.
    n_tokens = tokenizer.vocab_size + n_padding
    config = dataclasses.replace(MAMBA, vocab_size=n_tokens, tie_embeddings=False)
    params = jax.jit(params_of, static_argnums=0)(config)
    seen, logits = [], build.logits

    def spy(params, config, x):
        seen.append([leaf.dtype.name for leaf in jax.tree.leaves(params["lm_head"])])
        return logits(params, config, x)

    monkeypatch.setattr(build, "logits", spy)
    generate_text(params, config, tokenizer, ["a"], head=head, **SETTINGS)
    # The matrix itself and a scale per row, and no float32 matrix beside them.
    wanted = ["int8", "float32"] if head == "int8" else ["float32"]
    assert len(seen) > 1 and all(dtypes == wanted for dtypes in seen)


def test_mistakes_are_named(monkeypatch):
    numbers: dict[str, Any] = {**SETTINGS, "batch_size": None}
    check_settings(**numbers, head="int8")
    with pytest.raises(UserError, match=r"^unknown head=int4: choose one of exact, int8$"):
        check_settings(**numbers, head="int4")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_settings(**numbers, head="exact")
    with pytest.raises(UserError, match=r"^head=int8 is for a CPU, this is a gpu"):
        check_settings(**numbers, head="int8")
