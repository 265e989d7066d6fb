"""The time that a run spends on training, without evaluations, saves and compilation."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Measures intervals.

    Attributes:
      secs: of training in the interval.
      data_secs: the part of it spent waiting for a batch.
    """

    def __init__(self) -> None:
        self.secs = self.data_secs = 0.0
        self._clock: float | None = None
        self._pauses = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what is not training (an evaluation, a save).

        The end of the first pause starts the clock, so that compilation is excluded as well. Among
        nested pauses only the outermost counts.
        """
        self._stop()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
        if not self._pauses:
            self._clock = time.perf_counter()

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches and measures how long the training waits for each."""
        before = time.perf_counter()
        for batch in batches:
            if self._clock is not None:
                self.data_secs += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def step(self) -> bool:
        """Adds the time since the last step; returns whether the clock ran."""
        if self._clock is None:
            return False
        self._stop()
        self._clock = time.perf_counter()
        return True

    def restart(self) -> None:
        """Begins an interval."""
        self.secs = self.data_secs = 0.0

    def _stop(self) -> None:
        if self._clock is not None:
            self.secs += time.perf_counter() - self._clock
            self._clock = None
