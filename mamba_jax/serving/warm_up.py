"""Compiles what an engine runs before it serves, several programs at a time.

Every program is called once with arrays like those of the engine: not committed to a device.
XLA compiles without Python's lock, so threads share the cores.
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
from mamba_jax.serving import slots as device
from mamba_jax.serving.batched_sampling import batch_sampling


class WarmUp:
    """The programs of one engine.

    Attributes:
      n_programs: in total.
      n_compiled: so far.
    """

    def __init__(self, params: build.Params, model_args: dict[str, Any], counts: Sequence[int]):
        """Takes the parameters, the keyword arguments of programs, and the batch sizes."""
        state, first = device.empty(**model_args, n_slots=1), np.int32(0)
        slots = functools.partial(_like, state)
        tokens = {length: np.zeros((1, length), np.int32) for length in device.PREFILL_CHUNKS}

        def step(n: int) -> Any:
            sampling = batch_sampling([None] * n, [0] * n)
            return device.step(
                params, slots(n), sampling, np.bool_(False), np.ones(n, bool), **model_args
            )

        def chunk_logprobs(length: int) -> Any:
            x_btd = np.zeros((1, length, model_args["config"].d_model), np.float32)
            return device.chunk_logprobs(
                params, state.logits_bv, x_btd, tokens[length], **model_args
            )

        prefill = lambda length: device.prefill(
            params, state, tokens[length], tokens[length], **model_args
        )
        insert = lambda n: device.insert(slots(n), state, first)
        extract = lambda n: device.extract(slots(n), first)
        gather = lambda sizes: device.gather(slots(sizes[0]), np.zeros(sizes[1], np.int32))
        growths = [*itertools.pairwise(counts)]
        self._programs: list[Callable[[], Any]] = [
            functools.partial(run, size)
            for run, sizes in (  # slowest to compile first
                (step, counts),
                (prefill, device.PREFILL_CHUNKS),
                (chunk_logprobs, device.LOGPROB_CHUNKS),
                (insert, counts),
                (extract, counts),
                (gather, [*growths, *(growth[::-1] for growth in growths)]),
            )
            for size in sizes
        ]
        self.n_programs, self.n_compiled = len(self._programs), 0
        self._began = self._ended = time.monotonic()

    @property
    def secs(self) -> float:
        """The time spent so far."""
        return (time.monotonic() if self._programs else self._ended) - self._began

    def run(self, is_over: Callable[[], bool]) -> None:
        """Compiles all programs; starts no more of them once ``is_over`` returns true."""
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


def _like(state: device.Slots, n_slots: int) -> device.Slots:
    """Makes slots without compiling a program."""
    zeros = lambda leaf: jax.device_put(np.zeros((n_slots, *leaf.shape[1:]), leaf.dtype))
    return jax.tree.map(zeros, state)
