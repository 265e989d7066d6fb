"""The training step: its loss and update, what it refuses, its random numbers; evaluation."""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.models import build
from mamba_jax.training.loss import loss_sums
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.state import init_state
from mamba_jax.training.step import NORM_MEAN_DECAY, culprits, make_eval_step, make_train_step
from tests.support.tiny import assert_close
from tests.support.tiny_run import (
    EOT,
    HYBRID,
    MAMBA,
    assert_same_bits,
    one_device,
    quick_compiles,  # noqa: F401
    run_config,
    to_host,
    windows,
)

# An untied head keeps the head's gradient apart from the embedding's.
BASE = run_config(dataclasses.replace(MAMBA, tie_embeddings=False), skip_spikes=5.0, warmup_steps=3)
DROPOUT = run_config(dataclasses.replace(MAMBA, dropout=0.3), batch=8, microbatch=4)
KEPT = ("params", "opt_state", "gradient_norm_mean")


@functools.cache
def train_step(config):
    return make_train_step(config, one_device(), EOT)


@functools.cache
def _start(model, seed):
    return to_host(init_state(run_config(model, seed=seed), one_device()))


def start_of(config):
    """A state of step 0, fresh to be donated: on the device and not shared."""
    return on_device(_start(dataclasses.replace(config.model, dropout=0.0), config.seed))


def on_device(state):
    return jax.tree.map(jnp.array, state)


def states(config, steps):
    """Takes some steps; returns the last state on the host and the metrics of all."""
    state, metrics = start_of(config), []
    for i in range(steps):
        state, latest = train_step(config)(state, windows(config.vram.effective_batch_size, seed=i))
        metrics.append(to_host(latest))
    return to_host(state), metrics


def assert_untouched(before, after):
    assert int(after["step"]) == int(before["step"]) + 1
    for name in KEPT:
        assert_same_bits(before[name], after[name])


# --- what a good step does


def documents_loss(params, config, w):
    """Mean −log p from documents read one by one and whole logits: no packing, chunks or masks."""
    by_length = collections.defaultdict(list)
    for row in w:
        starts = [*np.flatnonzero(row[:-1] == EOT), len(row) - 1]
        for start, end in itertools.pairwise(starts):
            by_length[end - start].append(row[start : end + 1])
    total = 0.0
    for documents in map(jnp.asarray, by_length.values()):
        logits, _, _ = build.apply(params, config.model, documents[:, :-1])
        log_p = jax.nn.log_softmax(logits)
        total -= jnp.take_along_axis(log_p, documents[:, 1:, None], axis=-1).sum()
    return total / w[:, 1:].size


def test_a_step_is_adamw_on_the_mean_loss_over_documents():
    state = start_of(BASE)
    params, opt_state = to_host(state["params"]), to_host(state["opt_state"])
    w = windows(8)
    truth, gradients = jax.jit(jax.value_and_grad(lambda p: documents_loss(p, BASE, w)))(params)
    # Step 1 of 3 of the warm-up: a third of the peak.
    state["step"] = jnp.int32(1)
    state, metrics = train_step(BASE)(state, w)

    np.testing.assert_allclose(metrics["loss"], truth, rtol=1e-5)  # float32 sums in another order
    assert float(metrics["target_tokens"]) == 8 * 12
    np.testing.assert_allclose(metrics["learning_rate"], BASE.training.learning_rate / 3, rtol=1e-6)
    assert bool(metrics["finite"]) and not bool(metrics["skipped"])
    norms = jax.tree.map(np.linalg.norm, to_host(gradients))
    # Gradients of packed and of separate documents: rounding of the scan, relative.
    assert_close(metrics["tensor_norms"], norms, 1e-4)
    whole = math.sqrt(sum(float(norm) ** 2 for norm in jax.tree.leaves(norms)))
    np.testing.assert_allclose(metrics["gradient_norm"], whole, rtol=1e-5)
    np.testing.assert_allclose(state["gradient_norm_mean"], whole, rtol=1e-5)  # the first sets it

    updates, _ = make_optimizer(BASE.training).update(gradients, opt_state, params)
    expected = jax.tree.map(lambda p, u: p - metrics["learning_rate"] * u, params, updates)
    # Adam's first step is about the sign of the gradient: where that is only rounding, so is the
    # sign. Entries whose gradient stands out of rounding have to agree.
    for ours, truth, start, g in zip(
        *map(jax.tree.leaves, (to_host(state["params"]), expected, params, gradients)), strict=True
    ):
        clear = np.abs(g) > 1e-4 * np.abs(g).max()
        np.testing.assert_allclose((ours - start)[clear], (truth - start)[clear], atol=1e-6)


def test_the_mean_norm_moves_slowly_and_starts_at_the_first():
    state, metrics = states(BASE, 3)
    first, second, third = (float(m["gradient_norm"]) for m in metrics)
    keep = NORM_MEAN_DECAY
    mean = keep * (keep * first + (1 - keep) * second) + (1 - keep) * third
    np.testing.assert_allclose(state["gradient_norm_mean"], mean, rtol=1e-6)


@pytest.mark.parametrize("model", [MAMBA, HYBRID], ids=["mamba", "hybrid"])
def test_accumulation_equals_the_full_batch(model):
    w = windows(8)

    def one_step(microbatch):
        config = run_config(model, batch=8, microbatch=microbatch)
        return train_step(config)(start_of(config), w)[1]

    whole, parts = one_step(8), one_step(2)
    # The same sums in float32 in another order; norms of small tensors relative to the largest.
    for name in ("loss", "gradient_norm", "target_tokens"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, err_msg=name)
    assert_close(parts["tensor_norms"], whole["tensor_norms"], 1e-4)
    assert_close(parts["aux"], whole["aux"], 1e-5)
    assert bool(whole["aux"]) == (model.family == "hybrid")


# --- what it refuses


def test_a_gradient_that_is_not_a_number_changes_nothing_and_names_the_culprit():
    state, _ = states(BASE, 1)
    # A = −exp(200) = −∞: the decay exp(ΔA) is a sound 0, its derivative 0 · ∞ is not.
    state["params"]["layers"]["mixer"]["A_log"][1, 3, 2] = 200.0
    after, metrics = train_step(BASE)(on_device(state), windows(8, seed=9))
    assert np.isfinite(metrics["loss"])
    assert not bool(metrics["finite"]) and bool(metrics["skipped"])
    assert_untouched(state, to_host(after))
    names = culprits(metrics["tensor_norms"])
    assert "layers.mixer.A_log" in names
    assert "norm_f.scale" not in names and "lm_head.kernel" not in names


def test_a_loss_that_is_not_a_number_changes_nothing():
    state, _ = states(BASE, 1)
    state["params"]["norm_f"]["scale"][5] = np.nan
    after, metrics = train_step(BASE)(on_device(state), windows(8, seed=9))
    assert np.isnan(metrics["loss"]) and not bool(metrics["finite"]) and bool(metrics["skipped"])
    assert_untouched(state, to_host(after))


def test_a_spike_is_skipped_and_the_next_step_is_taken():
    state, metrics = states(BASE, 1)
    w = windows(8, seed=1)
    norm = float(train_step(BASE)(on_device(state), w)[1]["gradient_norm"])
    limit = BASE.training.skip_spikes
    for mean, skipped in ((0.99 * norm / limit, True), (1.01 * norm / limit, False)):
        state["gradient_norm_mean"] = np.float32(mean)
        after, metrics = train_step(BASE)(on_device(state), w)
        assert bool(metrics["finite"])
        assert bool(metrics["skipped"]) == skipped
        if skipped:
            assert_untouched(state, to_host(after))
        else:
            moved = jax.tree.map(
                lambda a, b: bool((a != b).any()), state["params"], after["params"]
            )
            assert all(jax.tree.leaves(moved))


def test_an_exploding_norm_is_not_taken_even_as_the_first():
    state = to_host(start_of(BASE))
    state["params"]["norm_f"]["scale"][:] = 1e7  # logits, hence the gradient of the layers: large
    after, metrics = train_step(BASE)(on_device(state), windows(8))
    assert float(metrics["gradient_norm"]) > BASE.training.max_gradient_norm
    assert bool(metrics["finite"]) and bool(metrics["skipped"])
    assert_untouched(state, to_host(after))


def test_without_a_broken_tensor_the_largest_are_named():
    norms = {"a": {"b": 3.0, "c": 1.0}, "d": 2.0, "e": 0.5}
    assert culprits(norms, largest=2) == ["a.b", "d"]
    assert culprits(norms | {"d": math.inf, "e": math.nan}) == ["d", "e"]


def test_rows_of_no_token_stay_zero():
    """Neither the loss nor weight decay nor the moments touch them."""
    state, _ = states(BASE, 2)
    ids = BASE.model.vocab_size
    assert BASE.model.padded_vocab_size > ids
    for tree in (state["params"], state["opt_state"]):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if any(getattr(key, "key", "") in ("embedding", "lm_head") for key in path):
                assert np.any(leaf[:ids]) and not np.any(leaf[ids:]), path


# --- random numbers


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    first, first_metrics = states(DROPOUT, 2)
    again, again_metrics = states(DROPOUT, 2)
    assert_same_bits(first, again)
    assert_same_bits(first_metrics, again_metrics)
    other = dataclasses.replace(DROPOUT, seed=43)
    embedding = lambda config: start_of(config)["params"]["embed"]["embedding"]
    assert not np.array_equal(embedding(DROPOUT), embedding(other))
    # The same weights and text under another seed: other units drop out.
    _, metrics = train_step(other)(start_of(DROPOUT), windows(8, seed=0))
    assert float(metrics["loss"]) != float(first_metrics[0]["loss"])


def test_dropout_differs_by_step_and_is_off_in_evaluation():
    start, w = to_host(start_of(DROPOUT)), windows(8)

    def loss_at(step):
        state = on_device(start | {"step": np.int32(step)})
        return float(train_step(DROPOUT)(state, w)[1]["loss"])

    assert loss_at(0) == loss_at(0)
    assert len({loss_at(step) for step in (0, 1, 7)}) == 3

    evaluate = make_eval_step(DROPOUT, one_device(), EOT, np.ones(32, np.int32))
    sums = evaluate(start["params"], w, np.ones(8, np.float32))
    truth = documents_loss(
        on_device(start["params"]), DROPOUT, w
    )  # build.apply without a key: no dropout
    np.testing.assert_allclose(sums["nll"] / sums["targets"], truth, rtol=1e-5)


# --- rematerialisation, evaluation, learning


def test_rematerialisation_changes_neither_loss_nor_gradient():
    params = build.init(MAMBA, jax.random.key(0))
    w, weights = jnp.asarray(windows(4)), jnp.ones(4)

    def loss_and_gradient(remat):
        config = run_config(dataclasses.replace(MAMBA, remat=remat))
        loss = lambda p: loss_sums(p, config, one_device(), w, weights, EOT)[0]
        return jax.jit(jax.value_and_grad(loss))(params)

    truth = loss_and_gradient("none")
    for remat in ("dots", "full"):
        # Other fusions of the same float32 arithmetic.
        assert_close(loss_and_gradient(remat), truth, 1e-5)


def test_evaluation_sums_nats_targets_and_bytes_by_weight():
    config = run_config()
    params = build.init(MAMBA, jax.random.key(0))
    w = windows(4)
    token_bytes = np.arange(32, dtype=np.int32) % 5
    evaluate = make_eval_step(config, one_device(), EOT, token_bytes)
    sums = evaluate(params, w, np.array([1, 0, 1, 0], np.float32))
    kept = w[[0, 2]]
    truth = documents_loss(params, config, kept)
    np.testing.assert_allclose(sums["nll"], truth * 24, rtol=1e-5)  # another order of summing
    assert float(sums["targets"]) == 24
    assert float(sums["bytes"]) == token_bytes[kept[:, 1:]].sum()


@pytest.mark.parametrize("family", ["mamba", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_a_fixed_batch_can_be_memorised(family):
    model = dataclasses.replace(
        MAMBA,
        family=family,
        d_model=48,
        d_state=16,
        vocab_size=64,
        recursion_depth=2,
        attention_window=16,
    )
    config = run_config(
        model, warmup_steps=20, max_steps=300, weight_decay=0.0, loss_chunk_tokens=512
    )
    w = windows(8, 128, vocabulary=64)
    w[:, 0] = np.arange(1, 9)  # rows that begin alike could not be told apart at once
    state, step = start_of(config), train_step(config)
    for _ in range(300):
        state, metrics = step(state, w)
        if float(metrics["loss"]) < 0.05:
            return
    pytest.fail(f"loss {float(metrics['loss']):.3f} after 300 steps")
