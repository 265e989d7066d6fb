"""Slots with settings of their own against the definition, sorted in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.serving.batched_sampling import BatchedSampling, sample_batch

N_DRAWS = 4000
LOGITS = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2
# temperature, top_k, top_p; the last two limit nothing.
SETTINGS = [
    (1.0, 0, 1.0),
    (0.5, 3, 1.0),
    (1.0, 0, 0.8),
    (2.0, 5, 0.6),
    (0.7, 1, 1.0),
    (0.0, 4, 0.5),
    (1.0, 12, 1.0),
    (1.0, 99, 0.999999),
]


def distribution(logits, temperature, top_k, top_p):
    """What a token's probability is, by sorting."""
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    probability = np.exp(scaled[order] - scaled.max())
    probability[top_k or len(logits) :] = 0
    probability /= probability.sum()
    likelier = np.cumsum(probability) - probability
    probability[likelier >= top_p] = 0
    result = np.zeros(len(logits))
    result[order] = probability / probability.sum()
    return result


def draw(logits_bv, settings, seeds, positions):
    columns = np.array(settings).T
    sampling = BatchedSampling(
        *(column.astype(t) for column, t in zip(columns, ("f4", "i4", "f4"), strict=True)),
        np.array(seeds, np.uint32),
        np.array(positions, np.int32),
    )
    return np.asarray(jax.jit(sample_batch)(jnp.asarray(logits_bv), sampling))


def test_each_slot_is_drawn_from_its_own_distribution():
    settings = [each for each in SETTINGS for _ in range(N_DRAWS)]
    positions = list(range(N_DRAWS)) * len(SETTINGS)
    tokens = draw(np.tile(LOGITS, (len(settings), 1)), settings, [5] * len(settings), positions)
    for each, mine in zip(SETTINGS, tokens.reshape(len(SETTINGS), N_DRAWS), strict=True):
        expected = distribution(LOGITS, *each)
        found = np.bincount(mine, minlength=len(LOGITS)) / N_DRAWS
        assert not found[expected == 0].any(), each
        # Five standard deviations of a share.
        deviation = np.sqrt(expected * (1 - expected) / N_DRAWS)
        assert (np.abs(found - expected) <= 5 * deviation + 1e-9).all(), each


def test_a_slot_depends_on_its_seed_and_position_alone():
    settings = SETTINGS[:4]
    rows = np.stack([LOGITS, LOGITS[::-1], LOGITS, LOGITS * 2])
    together = draw(rows, settings, [1, 2, 3, 4], [7, 8, 9, 10])
    for i in range(4):
        assert draw(rows[i : i + 1], settings[i : i + 1], [i + 1], [i + 7]) == together[i]


def test_huge_logits_and_tiny_temperatures_stay_finite():
    logits = np.array([[2e38, 3e38, -3e38], [1e-3, 0.0, -1e-3]], np.float32)
    assert draw(logits, [(1e-30, 2, 0.9), (1e-30, 0, 0.5)], [0, 0], [0, 0]).tolist() == [1, 0]
