"""Continuous batching: one thread prefills prompts chunk by chunk and decodes all slots together.

    waiting  →  prefilling  →  decoding  →  ended

Each round prefills up to a budget of prompt tokens, round-robin over the prompts in progress, then
samples one token for every decoding slot. A sequence takes a slot when its prompt is prefilled and
frees it when its text ends; neither waits for the others. Output does not depend on which other
requests share the batch, up to the rounding of a batched matmul.
"""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from mamba_jax.errors import UserError, first_line
from mamba_jax.generation.ensemble import Model
from mamba_jax.generation.generate import prepare
from mamba_jax.serving.decoding import Decoding
from mamba_jax.serving.observer import Observer
from mamba_jax.serving.prefilling import Prefilling
from mamba_jax.serving.sequence import Event, Failed, GenerationRequest, Sequence
from mamba_jax.serving.warm_up import WarmUp

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The waiting queue is full."""


class Closed(Exception):
    """The engine accepts no more requests."""


class WarmingUp(Exception):
    """The engine is not ready: it is still compiling its programs."""


class Engine:
    """Serves requests with one model."""

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 16,
        max_queue: int = 256,
        prefix_cache_bytes: int = 256 << 20,
        timeout_secs: float = 600.0,
        observer: Observer | None = None,
        log: Callable[[str], None] = _log.info,
    ):
        """Prepares a model; ``start`` starts serving.

        Args:
          model: the model, in memory.
          max_batch: sequences prefilled or decoded at the same time.
          max_queue: how many more requests may wait.
          prefix_cache_bytes: size limit of the prefix cache; 0 disables it.
          timeout_secs: from a request's arrival to its end.
          observer: receives the engine's events.
          log: receives one line when the engine is ready.

        Raises:
          UserError: if a setting is out of range.
        """
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_queue", max_queue, 0),
            ("prefix_cache_bytes", prefix_cache_bytes, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if not timeout_secs > 0:
            raise UserError(f"timeout_secs={timeout_secs} must be above 0")
        self.tokenizer = model.tokenizer
        self.max_batch = max_batch
        # The batch sizes that programs are compiled for.
        slot_counts = [1 << i for i in range((max_batch - 1).bit_length())] + [max_batch]
        self.ready = threading.Event()
        (params,), _ = prepare((model,))
        model_args = {"config": model.config, "vocab_size": model.tokenizer.vocab_size}
        self._max_queue = max_queue
        self._timeout_secs = timeout_secs
        self._observer = observer or Observer()
        self._report = log
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._changed = threading.Condition()
        # Under the condition's lock:
        self._waiting: deque[Sequence] = deque()
        self._closing = False
        self._drain_until = float("inf")
        # Used by the engine thread only:
        self._prefilling = Prefilling(
            params,
            model_args,
            model.tokenizer,
            max_tails=max_batch,
            prefix_cache_bytes=prefix_cache_bytes,
            timeout_secs=timeout_secs,
        )
        self._decoding = Decoding(
            params,
            model_args,
            slot_counts,
            self._observer,
            self._prefilling.cache_answer,
            extracts=prefix_cache_bytes > 0,
        )
        self.warm_up = WarmUp(params, model_args, slot_counts)

    # Called by any thread.

    def start(self, warm_up: bool = True) -> None:
        """Starts the thread; ``ready`` is set when all programs are compiled.

        Without ``warm_up``, ``ready`` is set at once and programs are compiled on first use.
        """
        if not warm_up:
            self.ready.set()
        self._thread.start()

    def submit(
        self, requests: list[GenerationRequest], deliver: Callable[[int, Event], None]
    ) -> list[Sequence]:
        """Queues requests, all or none.

        Args:
          requests: to serve.
          deliver: the engine thread calls it with the index of a request and its next event. It
            must not block. The last event of each request is ``End`` or ``Failed``.

        Returns:
          One sequence per request, for ``cancel``.

        Raises:
          UserError: if there are more requests than batch and queue can ever hold.
          QueueFull: if the waiting queue is full; try again later.
          WarmingUp: before ``ready`` is set.
          Closed: after ``close``.
        """
        most = self.max_batch + self._max_queue
        if len(requests) > most:
            raise UserError(
                f"too many texts in one request: {len(requests)}; request at most {most}"
            )
        made = [
            Sequence(
                each,
                functools.partial(deliver, index),
                self._observer.ended,
                self.tokenizer,
                self._timeout_secs,
            )
            for index, each in enumerate(requests)
        ]
        with self._changed:
            if self._closing:
                raise Closed
            if not self.ready.is_set():
                raise WarmingUp
            # Requests for which a slot is free do not count as waiting.
            free = max(self.max_batch - self._n_served(), 0)
            if len(self._waiting) + len(made) > self._max_queue + free:
                raise QueueFull
            self._waiting.extend(made)
            self._changed.notify()
        return made

    def cancel(self, sequences: list[Sequence]) -> None:
        """Ends requests as soon as possible; has no effect on those that have ended."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._changed.notify()

    def close(self, drain_secs: float = 0.0) -> None:
        """Refuses new requests, lets running ones end within ``drain_secs``, ends the thread."""
        with self._changed:
            self._closing = True
            self._drain_until = time.monotonic() + drain_secs
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(drain_secs + 60)

    @property
    def alive(self) -> bool:
        """Whether the engine thread is running."""
        return self._thread.is_alive()

    # The thread.

    def _serve(self) -> None:
        try:
            if not self.ready.is_set():
                self.warm_up.run(lambda: self._closing)
                if self._closing:
                    return
                done = self.warm_up.n_compiled, self.warm_up.secs
                self._observer.warmed_up(*done)
                self._report("ready: compiled {} programs in {:.1f} s".format(*done))
                self.ready.set()
            while self._round():
                pass
        except Exception as error:
            _log.exception("the engine stopped")
            with self._changed:
                self._closing = True
                waiting = [*self._waiting]
                self._waiting.clear()
            self._fail_all(f"the engine stopped: {first_line(error)}", waiting)

    def _round(self) -> bool:
        """Runs one round; returns False when the engine is closed and all requests have ended."""
        with self._changed:
            while not (self._waiting or self._busy()):
                if self._closing:
                    return False
                self._changed.wait()
            for sequence in [s for s in self._waiting if self._is_over(s)]:
                self._waiting.remove(sequence)
            while self._waiting and self._n_served() < self.max_batch:
                self._prefilling.sequences.append(self._waiting.popleft())
            n_waiting = len(self._waiting)
            is_idle = not (self._prefilling.sequences or n_waiting or self._closing)
        try:
            if self._prefilling.tails and is_idle:
                self._prefilling.start_tail()
            self._prefilling.release(self._is_over)
            self._decoding.release(self._is_over)
            self._prefilling.round(self._decoding.insert)
            self._decoding.step()
        except Exception as error:  # mostly out of memory: later requests may succeed
            _log.exception("a step failed")
            self._fail_all(f"the step failed: {first_line(error)}")
        self._observer.round(
            n_waiting,
            self._prefilling.n_requests,
            self._decoding.n_active,
            self._prefilling.prefixes.bytes,
        )
        return True

    def _busy(self) -> bool:
        has_tails = self._prefilling.tails and not self._closing
        return bool(self._prefilling.sequences or self._decoding.is_busy or has_tails)

    def _n_served(self) -> int:
        """The number of client requests being prefilled or decoded."""
        return self._prefilling.n_requests + self._decoding.n_active

    def _is_over(self, sequence: Sequence) -> bool:
        """Ends a sequence that was cancelled or timed out; returns whether it has ended."""
        if sequence.ended:
            return True
        if sequence.cancelled:
            sequence.end(Failed("cancelled", "the client disconnected"))
        elif time.monotonic() > self._drain_until:
            sequence.end(Failed("stopping", "the server is stopping"))
        elif time.monotonic() > sequence.deadline:
            sequence.end(Failed("timeout", f"the request timed out after {self._timeout_secs:g} s"))
        return sequence.ended

    def _fail_all(self, why: str, waiting: list[Sequence] | None = None) -> None:
        """Fails every running request and those ``waiting``, and discards all device state."""
        failed = [*(waiting or ()), *self._prefilling.clear(), *self._decoding.clear()]
        for sequence in dict.fromkeys(failed):
            if not sequence.ended:
                sequence.end(Failed("error", why))
        self._decoding.allocate()
