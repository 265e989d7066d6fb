"""Thinning: curves of many values keep their extremes and their gaps."""

import math
import random

import numpy as np
import pytest

from mamba_jax.reports.charts import curve, smoothing_width, thin, trailing_mean


@pytest.mark.parametrize("count", [1, 7, 999, 1000, 1001, 20_011])
def test_each_point_is_the_mean_minimum_and_maximum_of_its_steps(count):
    draw = random.Random(count)
    steps = sorted(draw.sample(range(3 * count), count))
    values = [draw.gauss(0, 1) for _ in steps]
    points = thin(steps, values, 1000)
    assert min(count, 500) <= len(points.mean) <= 1000
    by_step = dict(zip(steps, values, strict=True))
    seen = []
    for first, last, mean, low, high in zip(
        points.first, points.last, points.mean, points.low, points.high, strict=True
    ):
        inside = [by_step[s] for s in range(first, last + 1) if s in by_step]
        assert low == min(inside) and high == max(inside)
        assert mean == pytest.approx(math.fsum(inside) / len(inside))
        seen += inside
    assert seen == values and not points.gaps


def test_a_spike_of_one_step_survives():
    values = [1.0] * 200_000
    values[123_456], values[7] = 900.0, -4.0
    points = thin(range(200_000), values)
    assert len(points.mean) <= 1000
    assert points.high.max() == 900 and points.low.min() == -4
    (place,) = np.flatnonzero(points.high == 900)
    assert points.first[place] <= 123_456 <= points.last[place]


def test_values_that_are_not_finite_are_reported_and_do_not_affect_others():
    nan, inf = math.nan, math.inf
    points = thin([1, 2, 3, 4, 5, 6, 7], [1.0, nan, inf, -inf, 5.0, 6.0, nan], 4)
    assert points.size == 2
    assert points.mean.tolist()[0] == 1 and points.mean.tolist()[2] == 5.5
    assert np.isnan(points.mean[[1, 3]]).all() and np.isnan(points.low[1])
    assert points.gaps == [(2, 1, "nan"), (3, 2, "inf, -inf"), (7, 1, "nan")]
    made = curve("loss", points)
    assert made["y"] == [1, None, 5.5, None] and made["high"] == [1, None, 6, None]


def test_no_values_make_no_points():
    assert curve("loss", thin([], [])) == {
        "name": "loss",
        "look": "line",
        "size": 1,
        "x": [],
        "y": [],
    }


def test_trailing_mean_by_hand():
    values = [1.0, 2.0, math.nan, 6.0, math.inf, 3.0]
    expected = [1, 1.5, 1.5, 4, 6, 4.5]  # of the last three, without NaN and infinity
    assert trailing_mean(values, 3).tolist() == expected
    assert np.isnan(trailing_mean([math.nan, 1.0], 1)).tolist() == [True, False]
    assert [smoothing_width(n) for n in (1, 79, 80, 400, 8_000, 200_000)] == [1, 1, 2, 10, 200, 200]
