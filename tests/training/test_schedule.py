"""The learning rate: values worked out by hand."""

import math

import numpy as np
import pytest

from mamba_jax.config import TrainingConfig
from mamba_jax.training.schedule import learning_rate

# float32 arithmetic on numbers near 1: a few units in the last place.
RTOL = 1e-6


def make(warmup, last, ratio=0.1):
    return learning_rate(
        TrainingConfig(
            learning_rate=3e-4, warmup_steps=warmup, max_steps=last, min_learning_rate_ratio=ratio
        )
    )


@pytest.mark.parametrize(
    ("step", "share_of_peak"),
    [
        (0, 0.0),
        (5, 0.25),
        (19, 0.95),
        (20, 1.0),  # the peak, at step warmup_steps
        (60, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (100, 0.55),  # half of it
        (140, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (180, 0.1),
        (181, 0.1),  # held
        (10_000, 0.1),
    ],
)
def test_values(step, share_of_peak):
    np.testing.assert_allclose(make(20, 180)(step), 3e-4 * share_of_peak, rtol=RTOL, atol=1e-12)


def test_without_warmup_starts_at_the_peak():
    schedule = make(0, 100)
    np.testing.assert_allclose(schedule(0), 3e-4, rtol=RTOL)
    np.testing.assert_allclose(schedule(50), 3e-4 * 0.55, rtol=RTOL)


def test_ratio_of_zero_ends_at_zero_and_of_one_stays():
    assert float(make(0, 100, ratio=0.0)(100)) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(make(10, 100, ratio=1.0)(np.arange(10, 120)), 3e-4, rtol=RTOL)
