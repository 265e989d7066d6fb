"""The sequences being decoded: one slot each, and one program that samples a token for all.

The device is one step ahead of the host: while tokens are turned into text, the next are made.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mamba_jax.models import build
from mamba_jax.serving import slots as device
from mamba_jax.serving.batched_sampling import batch_sampling
from mamba_jax.serving.observer import Observer
from mamba_jax.serving.prefix_cache import CACHE_EVERY_TOKENS
from mamba_jax.serving.sequence import Sequence, TokenLogprob
from mamba_jax.serving.slots import Slots

_Extracted = list[tuple[Sequence, Slots]]


class Decoding:
    """The batch; for the engine thread.

    Attributes:
      sequences: slot → its sequence.
    """

    def __init__(
        self,
        params: build.Params,
        model_args: dict[str, Any],
        slot_counts: list[int],
        observer: Observer,
        on_token: Callable[[Sequence, Slots | None], None],
        *,
        extracts: bool,
    ):
        """
        Args:
          params: of the model.
          model_args: keyword arguments of the device programs.
          slot_counts: the batch sizes that programs are compiled for, rising.
          observer: receives the times of tokens.
          on_token: called after each token of a sequence, with the state after it at every
            ``CACHE_EVERY_TOKENS``-th and the last one, else None.
          extracts: whether ``on_token`` needs these states.
        """
        self._params, self._model_args = params, model_args
        self._slot_counts = slot_counts
        self._observer, self._on_token = observer, on_token
        self._extracts = extracts
        self.sequences: list[Sequence | None] = [None]
        self._slots = device.empty(**model_args, n_slots=1)
        self._in_flight: tuple[list[Sequence | None], jax.Array, Any, _Extracted] | None = None

    @property
    def n_active(self) -> int:
        """The number of slots in use."""
        return sum(sequence is not None for sequence in self.sequences)

    @property
    def is_busy(self) -> bool:
        return bool(self.n_active or self._in_flight)

    def release(self, is_over: Callable[[Sequence], bool]) -> None:
        """Frees the slots of sequences that are over."""
        for slot, sequence in enumerate(self.sequences):
            if sequence is not None and is_over(sequence):
                self.sequences[slot] = None

    def clear(self) -> list[Sequence]:
        """Removes and returns all sequences, those of the step in flight included.

        Call ``allocate`` before the next ``insert``.
        """
        removed = [*self.sequences, *(self._in_flight[0] if self._in_flight else [])]
        self.sequences, self._in_flight = [None], None
        return [sequence for sequence in removed if sequence is not None]

    def allocate(self) -> None:
        """Replaces the state on the device, which a failed step may have lost."""
        self._slots = device.empty(**self._model_args, n_slots=1)

    def insert(self, sequence: Sequence) -> None:
        """Gives a sequence whose prompt is prefilled a slot."""
        if None not in self.sequences:
            self._resize(next(n for n in self._slot_counts if n > len(self.sequences)))
        slot = self.sequences.index(None)
        self._slots = device.insert(self._slots, sequence.state, np.int32(slot))
        self.sequences[slot] = sequence
        sequence.state = None

    def _resize(self, n_slots: int) -> None:
        """Changes the number of slots, moving those in use to the front."""
        used = [slot for slot, sequence in enumerate(self.sequences) if sequence is not None]
        padding = [0] * (n_slots - len(used))
        self._slots = device.gather(self._slots, np.array(used + padding, np.int32))
        self.sequences = [*(self.sequences[slot] for slot in used), *[None] * len(padding)]

    def step(self) -> None:
        """Starts the next step, then processes the tokens of the previous one."""
        smaller = [n for n in self._slot_counts if n < len(self.sequences)]
        # Two sizes down, so that a batch whose size fluctuates is not copied at every step.
        if len(smaller) > 1 and self.n_active <= smaller[-2]:
            self._resize(smaller[-1])
        started = None
        if self.n_active:
            extracted: _Extracted = []
            started = list(self.sequences), *self._sample(), extracted
            for slot, sequence in enumerate(self.sequences):
                if sequence is not None:
                    sequence.n_chosen += 1
                    is_last = sequence.n_chosen == sequence.request.max_tokens
                    if self._extracts and (is_last or sequence.n_chosen % CACHE_EVERY_TOKENS == 0):
                        extracted.append((sequence, device.extract(self._slots, np.int32(slot))))
                    if is_last:
                        self.sequences[slot] = None
        before, self._in_flight = self._in_flight, started
        if before is not None:
            self._finish_step(*before)

    def _sample(self) -> tuple[jax.Array, Any]:
        """Starts sampling the next token of every slot; returns the tokens and their logprobs."""
        with_logprobs: Any = np.bool_(_want_logprobs(self.sequences))
        sampling = batch_sampling(
            [sequence and sequence.request for sequence in self.sequences],
            [sequence.n_chosen if sequence else 0 for sequence in self.sequences],
        )
        active_b = np.array([sequence is not None for sequence in self.sequences])
        token_b, logprobs, self._slots = device.step(
            self._params, self._slots, sampling, with_logprobs, active_b, **self._model_args
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
                else TokenLogprob.of(logprobs, slot, token, n_top)
            )
            self._on_token(sequence, states.get(id(sequence)))
            if sequence.ended and sequence in self.sequences:
                self.sequences[self.sequences.index(sequence)] = None


def _want_logprobs(sequences: list[Sequence | None]) -> bool:
    return any(s is not None and s.request.logprobs is not None for s in sequences)
