"""Which window is the i-th sample of a run: a function of (windows, weights, seed, i) alone.

Shapes: k sources, p samples of a mixture cycle.
"""

import bisect
from collections.abc import Sequence

import numpy as np

# Shares are whole numbers of this many samples: none is off by more than 1 in 65,536.
_CYCLE_SAMPLES = 1 << 16


class SampleOrder:
    """Shuffled epochs of each source, interleaved evenly by weight.

    A phase repeats one cycle of sources, in which the samples of each source are evenly spread.
    After any number of samples every source has had its share to within about one window, and the
    number of its samples can be computed without counting. Each source has its own shuffled epochs.
    """

    def __init__(self, lengths: Sequence[int], phases: Sequence[tuple[int, Sequence[float]]], seed):
        """Args:
        lengths: windows of each source; may be 0 where the weight always is.
        phases: (first sample, weight of each source), the first at 0, rising.
        seed: random seed of the orders, 0 or more.
        """
        # A source without windows has weight 0 and is never used.
        self._orders = [_Epochs(length, _seed_of(seed, k)) for k, length in enumerate(lengths)]
        self._starts = [start for start, _ in phases]
        self._cycles = [MixtureCycle(weights) for _, weights in phases]
        self._bases = [[0] * len(lengths)]
        for cycle, start, end in zip(self._cycles, self._starts, self._starts[1:], strict=False):
            self._bases.append(_added(self._bases[-1], cycle.counts(end - start)))

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Returns (source, index of its window)."""
        phase = bisect.bisect_right(self._starts, sample) - 1
        source, number = self._cycles[phase].place(sample - self._starts[phase])
        return source, self._orders[source][self._bases[phase][source] + number]

    def counts(self, samples: int) -> list[int]:
        """Returns how many of the first samples come from each source."""
        phase = max(bisect.bisect_left(self._starts, samples) - 1, 0)
        cycle = self._cycles[phase]
        return _added(self._bases[phase], cycle.counts(samples - self._starts[phase]))


class _Epochs:
    """Endless shuffled epochs of one source, each a permutation that is computed, not stored."""

    def __init__(self, length: int, seed: int):
        from grain.experimental import index_shuffle  # takes a second: not before it is needed

        self._permuted, self._length = index_shuffle, length
        # Derived from the seed as grain's ``.seed(s).shuffle()`` does; each epoch adds its number.
        # Added to s itself, epoch 1 of seed s would equal epoch 0 of seed s + 1, and runs with
        # neighbouring seeds would see the same orders.
        self._seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])

    def __getitem__(self, number: int) -> int:
        epoch, at = divmod(number, self._length)
        return self._permuted(at, self._length - 1, (self._seed + epoch) % (1 << 32), 4)


class MixtureCycle:
    """The sources of ``_CYCLE_SAMPLES`` samples, repeated endlessly."""

    def __init__(self, weights: Sequence[float]):
        self._counts_k = _apportion(np.asarray(weights, np.float64))
        source_p = np.repeat(np.arange(len(weights)), self._counts_k)
        number_p = np.concatenate([np.arange(count) for count in self._counts_k])
        order_p = np.argsort((number_p + 0.5) / self._counts_k[source_p], kind="stable")
        self._source_p, self._number_p = source_p[order_p], number_p[order_p]

    def place(self, sample: int) -> tuple[int, int]:
        """Returns (source, how many of it came before)."""
        cycles, at = divmod(sample, _CYCLE_SAMPLES)
        source = int(self._source_p[at])
        return source, cycles * int(self._counts_k[source]) + int(self._number_p[at])

    def counts(self, samples: int) -> list[int]:
        cycles, rest = divmod(samples, _CYCLE_SAMPLES)
        started_k = np.bincount(self._source_p[:rest], minlength=len(self._counts_k))
        return (cycles * self._counts_k + started_k).tolist()


def _apportion(weights_k: np.ndarray) -> np.ndarray:
    """Returns int64 (k,) that sum to a cycle, in the ratio of the weights (largest remainders);
    at least 1 where the weight is not 0."""
    exact_k = weights_k / weights_k.sum() * _CYCLE_SAMPLES
    counts_k = np.maximum(np.floor(exact_k), weights_k > 0).astype(np.int64)
    missing = _CYCLE_SAMPLES - int(counts_k.sum())
    if missing >= 0:
        counts_k[np.argsort(counts_k - exact_k, kind="stable")[:missing]] += 1
    else:
        counts_k[np.argmax(counts_k)] += missing
    return counts_k


def _added(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _seed_of(seed: int, source: int) -> int:
    """Returns the seed itself for the first source, for others one far from any neighbour's:
    two sources of equal length would otherwise be shuffled alike."""
    if not source:
        return seed
    words = np.random.SeedSequence([seed, source]).generate_state(2, np.uint32)
    return int(words[0]) << 16 ^ int(words[1])
