"""Compiles what an engine runs before it serves, several programs at a time.

Every program is called once with arrays like those that it will be given: not committed to a
device, as all of an engine's are. XLA compiles without Python's lock, so threads share the cores.
"""

import concurrent.futures
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mamba_jax.models import build
from mamba_jax.serving import rows as device
from mamba_jax.serving.row_sampling import choosing_of


class WarmUp:
    """The programs of one engine.

    Attributes:
      n_programs: how many there are.
      n_compiled: so far.
    """

    def __init__(self, params: build.Params, how: dict[str, Any], counts: Sequence[int]):
        """Takes parameters, the structure and vocabulary, and the numbers of rows that decode."""
        row, first = device.empty(**how, n_rows=1), np.int32(0)
        rows = functools.partial(_like, row)
        tokens = {length: np.zeros((1, length), np.int32) for length in device.PIECES}

        def step(n: int) -> Any:
            choosing = choosing_of([None] * n, [0] * n)
            return device.step(params, rows(n), choosing, np.bool_(False), **how)

        def score(length: int) -> Any:
            x_btd = np.zeros((1, length, how["config"].d_model), np.float32)
            return device.score(params, row.logits_bv, x_btd, tokens[length], **how)

        read = lambda length: device.read(params, row, tokens[length], tokens[length], **how)
        put = lambda n: device.put(rows(n), row, first)
        copy = lambda n: device.copy(rows(n), first)
        take = lambda sizes: device.take(rows(sizes[0]), np.zeros(sizes[1], np.int32))
        growths = [*itertools.pairwise(counts)]
        self._programs: list[Callable[[], Any]] = [
            functools.partial(run, size)
            for run, sizes in (  # what takes longest comes first
                (step, counts),
                (read, device.PIECES),
                (score, device.SCORED_PIECES),
                (put, counts),
                (copy, counts),
                (take, [*growths, *(growth[::-1] for growth in growths)]),
            )
            for size in sizes
        ]
        self.n_programs, self.n_compiled = len(self._programs), 0
        self._began = self._ended = time.monotonic()

    @property
    def secs(self) -> float:
        """How long it has taken so far."""
        return (time.monotonic() if self._programs else self._ended) - self._began

    def run(self, is_over: Callable[[], bool]) -> None:
        """Compiles all; begins with no further one once ``is_over`` says so."""
        self._began = time.monotonic()

        def compile_one(program: Callable[[], Any]) -> bool:
            if is_over():
                return False
            jax.block_until_ready(program())
            return True

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "warm-up") as executor:
            compiling = [executor.submit(compile_one, program) for program in self._programs]
            for done in concurrent.futures.as_completed(compiling):
                self.n_compiled += done.result()
        self._programs = []
        self._ended = time.monotonic()


def _like(row: device.Rows, n_rows: int) -> device.Rows:
    """Makes rows without a program of its own."""
    zeros = lambda leaf: jax.device_put(np.zeros((n_rows, *leaf.shape[1:]), leaf.dtype))
    return jax.tree.map(zeros, row)
