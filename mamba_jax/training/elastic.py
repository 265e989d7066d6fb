"""A train step that recovers from an out-of-memory error with a smaller microbatch.

The state is donated to the step, and XLA's GPU client frees donated arrays before it allocates
what the step needs: if that allocation fails, the state is lost. Every step needs the same memory,
so it is checked before the first one:

* Where the device reports its free memory, the step is compiled first, and a microbatch whose
  buffers do not fit is halved before anything runs (accumulation doubled). Nothing is lost.
* If a step fails nevertheless and the state still exists (a failed compilation), the same batch is
  tried again with half the microbatch. The mean over the effective batch is the same up to
  rounding.
* If the state is lost, nothing can be retried: ``OutOfMemory``, after which the run starts again
  from the newest checkpoint, or from its beginning: a run is a function of its config.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError
from mamba_jax.training.state import TrainState
from mamba_jax.training.step import Metrics, make_train_step


class OutOfMemory(Exception):
    """A step ran out of memory after its state had been freed."""

    def __init__(self, config: RunConfig):
        super().__init__("the device ran out of memory and the state is lost")
        self.config = config  # with a smaller microbatch


class ElasticStep:
    """``step(state, windows) → (state, metrics)``, as ``make_train_step`` makes it.

    Attributes:
      config: the run's config, with the current microbatch.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, eot_id: int, warn: Callable[[str], None]):
        """
        Args:
          config, mesh, eot_id: as for ``make_train_step``.
          warn: receives a message on every change.
        """
        self.config = config
        self._mesh, self._eot_id, self._warn = mesh, eot_id, warn
        self._step = make_train_step(config, mesh, eot_id)
        self._proven = False  # whether a step of this size has succeeded

    def __call__(self, state: TrainState, windows: Any) -> tuple[TrainState, Metrics]:
        """Takes a step.

        Raises:
          OutOfMemory: if the state is lost.
          UserError: if the smallest microbatch is too large.
        """
        while True:
            if not self._proven and self._lacks_memory(state, windows):
                self._shrink()
                continue
            try:
                new_state, metrics = self._step(state, windows)
                if not self._proven:
                    # A device reports its failures late; here nothing depends on the result yet.
                    jax.block_until_ready(metrics)
                    self._proven = True
                return new_state, metrics
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            self._shrink()
            if lost:
                raise OutOfMemory(self.config)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turns an out-of-memory error of a later call into ``OutOfMemory``."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._shrink()
            raise OutOfMemory(self.config) from None

    def _lacks_memory(self, state: TrainState, windows: Any) -> bool:
        """Whether the compiled step needs more memory than is free; False where that is unknown."""
        free = free_bytes(self._mesh.local_devices)
        if free is None:
            return False
        step: Any = self._step
        needs = (
            step.lower(state, windows).compile().memory_analysis()
        )  # the call reuses this compilation
        new = needs.output_size_in_bytes - needs.alias_size_in_bytes  # the rest is in the state
        return needs.temp_size_in_bytes + new > free

    def _shrink(self) -> None:
        before = self.config.vram
        self.config = smaller(self.config, self._mesh.size)
        after = self.config.vram
        self._warn(
            f"out of memory with a microbatch of {before.batch_size}: continuing with "
            f"{after.batch_size} × {after.accumulation_steps} (before {before.batch_size} × "
            f"{before.accumulation_steps}; the effective batch stays {after.effective_batch_size})"
        )
        self._step = make_train_step(self.config, self._mesh, self._eot_id)
        self._proven = False


def free_bytes(devices: Sequence[Any]) -> int | None:
    """Returns what jax can still allocate on the fullest device; None: unknown."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each and "bytes_in_use" in each for each in stats):
        return None
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)


def smaller(config: RunConfig, devices: int) -> RunConfig:
    """Returns a run with half the microbatch, or the next smaller one that divides the batch.

    Raises:
      UserError: if it is already one sequence per device.
    """
    vram = config.vram
    sizes = [size for size in vram.microbatches(devices) if 2 * size <= vram.batch_size]
    if not sizes:
        raise UserError(
            f"out of memory with vram.batch_size={vram.batch_size}, which is the smallest: choose "
            "a smaller --model_size, --config.model.max_seq_len or --config.model.remat=full"
        )
    size = sizes[-1]
    layout = dataclasses.replace(
        vram, batch_size=size, gradient_accumulation_steps=vram.effective_batch_size // size
    )
    return dataclasses.replace(config, vram=layout)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the runtime is a failed allocation."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
