"""Continuous batching: one thread prefills prompts chunk by chunk and decodes all slots together.

    waiting  →  prefilling  →  decoding  →  ended

Each round prefills up to a budget of prompt tokens, round-robin over the prompts in progress, then
samples one token for every decoding slot. A sequence takes a slot when its prompt is prefilled and
frees it when its text ends; neither waits for the others. Output does not depend on which other
requests share the batch, up to the rounding of a batched matmul.

The device is one step ahead of the host: while tokens are turned into text, the next are made.
"""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mamba_jax.errors import UserError, first_line
from mamba_jax.generation.ensemble import Model
from mamba_jax.generation.generate import prepare
from mamba_jax.serving import slots as device
from mamba_jax.serving.batched_sampling import batch_sampling
from mamba_jax.serving.observer import Observer
from mamba_jax.serving.prefix_cache import PrefixCache
from mamba_jax.serving.sequence import (
    Event,
    Failed,
    GenerationRequest,
    PromptLogprobs,
    Sequence,
    TokenLogprob,
)
from mamba_jax.serving.slots import Slots
from mamba_jax.serving.warm_up import WarmUp

PREFILL_BUDGET_TOKENS = device.PREFILL_CHUNKS[0]  # of all prompts, between two decoding steps
_PAD_MULTIPLE = device.LOGPROB_CHUNKS[-1]  # a prompt without a cached prefix is padded to it
CACHE_EVERY_TOKENS = 16  # of an answer: how often its state is added to the prefix cache
_Extracted = list[tuple[Sequence, Slots]]
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
          model: in memory.
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
        self._slot_counts = [1 << i for i in range((max_batch - 1).bit_length())] + [max_batch]
        self.ready = threading.Event()
        (self._params,), _ = prepare((model,))
        self._model_args: dict[str, Any] = {
            "config": model.config,
            "vocab_size": model.tokenizer.vocab_size,
        }
        self._max_queue = max_queue
        self._timeout_secs = timeout_secs
        self._observer = observer or Observer()
        self._report = log
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._changed = threading.Condition()
        # Under the condition's lock:
        self._waiting: deque[Sequence] = deque()
        self._closing = False
        self._drain_until = float("inf")
        # Used by the engine thread only:
        self._prefilling: deque[Sequence] = deque()
        self._tails: deque[np.ndarray] = deque(
            maxlen=max_batch
        )  # answers whose last tokens are to be prefilled
        self._sequences: list[Sequence | None] = [None]  # slot → its sequence
        self._slots = device.empty(**self._model_args, n_slots=1)
        self._in_flight: tuple[list[Sequence | None], jax.Array, Any, _Extracted] | None = None
        self.warm_up = WarmUp(self._params, self._model_args, self._slot_counts)

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
                self._prefilling.append(self._waiting.popleft())
            n_waiting = len(self._waiting)
            is_idle = not (self._prefilling or n_waiting or self._closing)
        try:
            if self._tails and is_idle:
                self._start_tail()
            self._release()
            self._prefill_round()
            self._step()
        except Exception as error:  # mostly out of memory: later requests may succeed
            _log.exception("a step failed")
            self._fail_all(f"the step failed: {first_line(error)}")
        self._observer.round(
            n_waiting,
            self._n_served() - self._n_decoding(),
            self._n_decoding(),
            self._prefixes.bytes,
        )
        return True

    def _busy(self) -> bool:
        has_tails = self._tails and not self._closing
        return bool(self._prefilling or self._n_decoding() or self._in_flight or has_tails)

    def _n_decoding(self) -> int:
        return sum(sequence is not None for sequence in self._sequences)

    def _n_served(self) -> int:
        """The number of client requests being prefilled or decoded."""
        return sum(not sequence.is_tail for sequence in self._prefilling) + self._n_decoding()

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

    def _release(self) -> None:
        """Frees the slots of sequences that are over."""
        for sequence in [s for s in self._prefilling if self._is_over(s)]:
            self._prefilling.remove(sequence)
        for slot, sequence in enumerate(self._sequences):
            if sequence is not None and self._is_over(sequence):
                self._sequences[slot] = None

    def _prefill_round(self) -> None:
        """Prefills prompts round-robin, up to the budget; inserts complete ones into the batch."""
        budget = PREFILL_BUDGET_TOKENS
        while self._prefilling and budget > 0:
            sequence = self._prefilling[0]  # removed on success only, so that _fail_all finds it
            if sequence.state is None and any(
                other.state is not None and other.request.tokens is sequence.request.tokens
                for other in self._prefilling
            ):
                # Another choice of the same prompt is being prefilled: wait for its cache entry.
                self._prefilling.rotate(-1)
                continue
            budget -= self._prefill_chunk(sequence, budget)
            if sequence.n_prefilled < len(sequence.request.tokens):
                self._prefilling.rotate(-1)
                continue
            if sequence.prompt_logprobs:
                sequence.emit(PromptLogprobs(tuple(sequence.prompt_logprobs)))
            if sequence.request.max_tokens:
                self._insert(sequence)
            else:
                sequence.finish_without_tokens()
            self._prefilling.popleft()

    def _prefill_chunk(self, sequence: Sequence, budget: int) -> int:
        """Prefills the next chunk of a prompt; returns its length, at most about ``budget``."""
        request = sequence.request
        state = sequence.state
        if state is None:
            if not request.prompt_logprobs:
                match = self._prefixes.find(request.tokens)
                state = match.state
                sequence.n_prefilled, sequence.branch_at = match.n_tokens, match.n_common
                sequence.n_cached = sequence.n_prefilled
                sequence.continues_answer = match.is_answer
            state = state or device.empty(**self._model_args, n_slots=1)
            sequence.state = state
        start = sequence.n_prefilled
        stop = sequence.branch_at if sequence.branch_at > start else len(request.tokens)
        if stop == start:  # the whole prompt was cached
            return 0
        n_padding = -(stop - start) % _PAD_MULTIPLE if start == 0 else 0
        most = min(n_padding + stop - start, max(budget, _PAD_MULTIPLE))
        length = next(length for length in device.PREFILL_CHUNKS if length <= most)
        n_new = length - n_padding
        tokens_bt = np.pad(request.tokens[None, start : start + n_new], ((0, 0), (n_padding, 0)))
        segments_bt = np.pad(np.ones((1, n_new), np.int32), ((0, 0), (n_padding, 0)))
        before_bv = state.logits_bv
        state, x_btd = device.prefill(
            self._params, state, tokens_bt, segments_bt, **self._model_args
        )
        if request.prompt_logprobs:
            logprobs = device.chunk_logprobs(
                self._params, before_bv, x_btd, tokens_bt, **self._model_args
            )
            logprobs = jax.tree.map(np.asarray, logprobs)
            sequence.prompt_logprobs += [
                _token_logprob(logprobs, n_padding + i, int(token), request.logprobs or 0)
                if start + i
                else TokenLogprob(int(token), None)
                for i, token in enumerate(request.tokens[start : start + n_new])
            ]
        sequence.state = state
        sequence.n_prefilled += n_new
        if (
            sequence.n_prefilled in (sequence.branch_at, len(request.tokens))
            and not request.prompt_logprobs
        ):
            is_answer = sequence.is_tail and sequence.n_prefilled == len(request.tokens)
            self._prefixes.add(request.tokens[: sequence.n_prefilled], state, is_answer=is_answer)
        return length

    def _insert(self, sequence: Sequence) -> None:
        if None not in self._sequences:
            self._resize(next(n for n in self._slot_counts if n > len(self._sequences)))
        slot = self._sequences.index(None)
        self._slots = device.insert(self._slots, sequence.state, np.int32(slot))
        self._sequences[slot] = sequence
        sequence.state = None

    def _resize(self, n_slots: int) -> None:
        """Changes the number of slots, moving those in use to the front."""
        used = [slot for slot, sequence in enumerate(self._sequences) if sequence is not None]
        padding = [0] * (n_slots - len(used))
        self._slots = device.gather(self._slots, np.array(used + padding, np.int32))
        self._sequences = [*(self._sequences[slot] for slot in used), *[None] * len(padding)]

    def _step(self) -> None:
        """Starts the next step, then processes the tokens of the previous one."""
        smaller = [n for n in self._slot_counts if n < len(self._sequences)]
        # Two sizes down, so that a batch whose size fluctuates is not copied at every step.
        if len(smaller) > 1 and self._n_decoding() <= smaller[-2]:
            self._resize(smaller[-1])
        started = None
        if self._n_decoding():
            extracted: _Extracted = []
            started = list(self._sequences), *self._sample(), extracted
            for slot, sequence in enumerate(self._sequences):
                if sequence is not None:
                    sequence.n_chosen += 1
                    is_last = sequence.n_chosen == sequence.request.max_tokens
                    if self._prefixes.max_bytes and (
                        is_last or sequence.n_chosen % CACHE_EVERY_TOKENS == 0
                    ):
                        extracted.append((sequence, device.extract(self._slots, np.int32(slot))))
                    if is_last:
                        self._sequences[slot] = None
        before, self._in_flight = self._in_flight, started
        if before is not None:
            self._finish_step(*before)

    def _sample(self) -> tuple[jax.Array, Any]:
        """Starts sampling the next token of every slot; returns the tokens and their logprobs."""
        with_logprobs: Any = np.bool_(_want_logprobs(self._sequences))
        sampling = batch_sampling(
            [sequence and sequence.request for sequence in self._sequences],
            [sequence.n_chosen if sequence else 0 for sequence in self._sequences],
        )
        token_b, logprobs, self._slots = device.step(
            self._params, self._slots, sampling, with_logprobs, **self._model_args
        )
        return token_b, logprobs

    def _finish_step(
        self,
        sequences: list[Sequence | None],
        token_b: jax.Array,
        logprobs: Any,
        extracted: _Extracted,
    ) -> None:
        """Appends a step's tokens to their sequences; frees the slots of those that ended."""
        states = {id(sequence): state for sequence, state in extracted}
        tokens = np.asarray(token_b).tolist()
        logprobs = jax.tree.map(np.asarray, logprobs) if _want_logprobs(sequences) else None
        now = time.monotonic()
        for slot, sequence in enumerate(sequences):
            if sequence is None or sequence.ended:
                continue
            if sequence.n_new == 0:
                self._observer.first_token(now - sequence.arrived)
            else:
                self._observer.next_token(now - sequence.last_time)
            sequence.last_time = now
            token = tokens[slot]
            n_top = sequence.request.logprobs
            sequence.append(
                TokenLogprob(token, None)
                if n_top is None
                else _token_logprob(logprobs, slot, token, n_top)
            )
            self._cache_answer(sequence, states.get(id(sequence)))
            if sequence.ended and sequence in self._sequences:
                self._sequences[self._sequences.index(sequence)] = None

    def _cache_answer(self, sequence: Sequence, state: Slots | None) -> None:
        """Caches the state after an answer, from which the next turn of a chat continues.

        When the host finds that a text has ended, the device has already processed one more token.
        So the state is copied every ``CACHE_EVERY_TOKENS`` tokens, and the last tokens are
        prefilled when no request waits.
        """
        ends_document = len(sequence.new_tokens) < sequence.n_new
        if state is not None and not ends_document:
            tokens = sequence.all_tokens()
            self._prefixes.add(tokens, state, is_answer=True, replaces=sequence.cached_answer)
            sequence.cached_answer = tokens
        if sequence.ended and self._prefixes.max_bytes:
            self._tails.append(sequence.all_tokens())

    def _start_tail(self) -> None:
        """Starts to prefill an answer's tokens after its newest cache entry, if it still exists."""
        tokens = self._tails.popleft()
        if 0 < len(tokens) - self._prefixes.find(tokens).n_tokens <= CACHE_EVERY_TOKENS:
            tail = GenerationRequest(tokens, max_tokens=0)
            ignore = lambda *_: None
            sequence = Sequence(tail, ignore, ignore, self.tokenizer, self._timeout_secs)
            sequence.is_tail = True
            self._prefilling.append(sequence)

    def _fail_all(self, why: str, waiting: list[Sequence] | None = None) -> None:
        """Fails every running request and those ``waiting``, and discards all device state."""
        failed = [*(waiting or ()), *self._prefilling, *filter(None, self._sequences)]
        failed += filter(None, self._in_flight[0] if self._in_flight else [])
        self._prefilling.clear()
        self._tails.clear()
        self._prefixes.clear()
        self._sequences, self._in_flight = [None], None
        for sequence in dict.fromkeys(failed):
            if not sequence.ended:
                sequence.end(Failed("error", why))
        self._slots = device.empty(**self._model_args, n_slots=1)


def _token_logprob(logprobs: Any, slot: int, token: int, n_top: int) -> TokenLogprob:
    ids = logprobs.top_ids_bm[slot, :n_top].tolist()
    values = logprobs.top_bm[slot, :n_top].tolist()
    top = zip(ids, values, strict=True)
    return TokenLogprob(token, float(logprobs.chosen_b[slot]), tuple(top))


def _want_logprobs(sequences: list[Sequence | None]) -> bool:
    return any(s is not None and s.request.logprobs is not None for s in sequences)
