"""The order of windows against counting one sample after another."""

import numpy as np
import pytest

from mamba_jax.data.windows.order import SampleOrder

PHASES = [(0, (3.0, 1.0, 0.0)), (700, (0.0, 1.0, 1.0)), (100_000, (1.0, 1e-9, 2.0))]


@pytest.fixture(scope="module")
def drawn():
    """About 170,000 samples, with a boundary of each kind inside; epochs are rotated, which takes
    minutes less than shuffling them."""
    with pytest.MonkeyPatch.context() as patch:
        rotated = lambda at, last, seed, rounds: (at + seed) % (last + 1)
        patch.setattr("grain.experimental.index_shuffle", rotated)
        order = SampleOrder([50, 7, 1_000], PHASES, seed=3)
    return order, [order[sample] for sample in range(170_000)]


def test_counts_equal_counting_one_by_one(drawn):
    order, places = drawn
    sources = np.array([source for source, _ in places])
    for samples in (0, 1, 2, 699, 700, 701, 65_536, 66_236, 100_000, 100_001, 169_999, 170_000):
        assert order.counts(samples) == np.bincount(sources[:samples], minlength=3).tolist()


def test_shares_hold_at_every_moment(drawn):
    """Within a phase no source is ever more than a window from its share, nor a rounding of it:
    1 in 65,536, for the periods before."""
    _, places = drawn
    bounds = [start for start, _ in PHASES] + [len(places)]
    for (start, weights), end in zip(PHASES, bounds[1:], strict=True):
        sources = np.array([source for source, _ in places[start:end]])
        ideal = np.arange(1, len(sources) + 1)[:, None] * np.array(weights) / sum(weights)
        had = (sources[:, None] == np.arange(3)).cumsum(axis=0)
        slack = 1 + len(sources) / 65_536
        assert np.abs(had - ideal).max() <= slack
        for source, weight in enumerate(weights):
            assert had[-1, source] > 0 if weight else had[-1, source] == 0


def test_each_source_goes_through_whole_epochs_across_phases(drawn):
    _, places = drawn
    for source, length in enumerate([50, 7, 1_000]):
        windows = [window for mine, window in places if mine == source]
        for epoch in [windows[i : i + length] for i in range(0, len(windows), length)]:
            if len(epoch) == length:
                assert sorted(epoch) == list(range(length))


def test_sources_of_one_length_are_shuffled_apart():
    order = SampleOrder([40, 40], [(0, (1.0, 1.0))], seed=0)
    places = [order[sample] for sample in range(80)]
    first, second = ([window for mine, window in places if mine == k] for k in (0, 1))
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("seed", [0, 12_345])
def test_the_order_is_that_of_a_shuffled_and_repeated_dataset(seed):
    import grain

    order = SampleOrder([53], [(0, (1.0,))], seed)
    same = grain.MapDataset.range(53).seed(seed).shuffle().repeat(None)
    assert [order[i] for i in range(1_000)] == [(0, same[i]) for i in range(1_000)]
