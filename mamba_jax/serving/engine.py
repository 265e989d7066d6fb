"""Continuous batching: one thread that reads prompts piece by piece and decodes all rows together.

    waiting  →  reading  →  decoding  →  ended

Each round reads up to a budget of prompt tokens, in turns over the prompts under way, then chooses
one token for every decoding row. Sequences join when their prompt is read and leave when their
text ends; neither waits for the others. What a request is told does not depend on its company, up
to the rounding of a batched matmul.

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

from mamba_jax.errors import UserError, shortly
from mamba_jax.generation.ensemble import Model
from mamba_jax.models import build
from mamba_jax.serving import rows as device
from mamba_jax.serving.prefix_cache import PrefixCache
from mamba_jax.serving.row_sampling import Choosing
from mamba_jax.serving.sequence import Asked, End, Event, Failed, Scored, Sequence, Told

# Lengths of the pieces of prompts: any prompt is a few of them, and each is compiled.
_PIECES = (256, 64, 16, 8, 4, 2, 1)
PIECE_TOKENS = _PIECES[0]  # at most read of all prompts between two decoding steps
_IDLE = Asked(np.zeros(0, np.int32), max_tokens=0)  # what a row without a sequence does
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine takes no more requests."""


class Observer:
    """Is told what happens, by the engine's thread; this one does not listen."""

    def first_token(self, secs: float) -> None:
        """A first token came ``secs`` after its request."""

    def next_token(self, secs: float) -> None:
        """A further token came ``secs`` after the one before it."""

    def ended(self, sequence: Sequence, event: End | Failed) -> None:
        """A request ended."""

    def round(self, waiting: int, reading: int, decoding: int, snapshot_bytes: int) -> None:
        """So many requests are under way, and snapshots take so many bytes."""


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
    ):
        """Takes a model; ``start`` begins to serve.

        Args:
          model: in memory.
          max_batch: sequences that are read or decoded at a time.
          max_queue: requests that may wait besides.
          prefix_cache_bytes: for snapshots of states; 0: none.
          timeout_secs: from a request's arrival to its end.
          observer: is told what happens.

        Raises:
          UserError: if a number cannot work.
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
        # The numbers of rows that programs are compiled for.
        self._counts = [1 << i for i in range((max_batch - 1).bit_length())] + [max_batch]
        self.ready = threading.Event()
        self._params = build.prepare_for_decoding(jax.device_put(model.params), model.config)
        self._how: dict[str, Any] = {
            "config": model.config,
            "vocab_size": model.tokenizer.vocab_size,
        }
        self._max_queue = max_queue
        self._timeout_secs = timeout_secs
        self._observer = observer or Observer()
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._changed = threading.Condition()
        # Under the condition's lock:
        self._waiting: deque[Sequence] = deque()
        self._closing = False
        self._drain_until = float("inf")
        # Of the thread alone:
        self._reading: deque[Sequence] = deque()
        self._places: list[Sequence | None] = [None]  # row → its sequence
        self._rows = device.empty(**self._how, n_rows=1)
        self._under_way: tuple[list[Sequence | None], jax.Array, Any] | None = None

    # Called by any thread.

    def start(self, warm_up: bool = True) -> None:
        """Starts the thread; ``ready`` is set when all programs are compiled."""
        self._warm = warm_up
        self._thread.start()

    def submit(self, asked: list[Asked], deliver: Callable[[int, Event], None]) -> list[Sequence]:
        """Queues requests, all or none.

        Args:
          asked: the requests.
          deliver: is called, by the engine's thread, with the place of a request and its next
            event. It must not block. The last event of each is ``End`` or ``Failed``.

        Returns:
          What ``cancel`` takes.

        Raises:
          UserError: if there is never room for so many.
          QueueFull: if there is none now; try again later.
          Closed: after ``close``.
        """
        most = self.max_batch + self._max_queue
        if len(asked) > most:
            raise UserError(
                f"{len(asked)} texts at once are above the {most} that fit; ask for fewer"
            )
        made = [
            Sequence(
                each,
                functools.partial(deliver, place),
                self._observer.ended,
                self.tokenizer,
                self._timeout_secs,
            )
            for place, each in enumerate(asked)
        ]
        with self._changed:
            if self._closing:
                raise Closed
            # What has a free row does not really wait.
            free = self.max_batch - len(self._reading) - self._n_decoding()
            if len(self._waiting) + len(made) > self._max_queue + max(free, 0):
                raise QueueFull
            self._waiting.extend(made)
            self._changed.notify()
        return made

    def cancel(self, sequences: list[Sequence]) -> None:
        """Ends requests as soon as may be; those that have ended already stay as they are."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._changed.notify()

    def close(self, drain_secs: float = 0.0) -> None:
        """Takes no more requests, lets those under way end for so long, then ends the thread."""
        with self._changed:
            self._closing = True
            self._drain_until = time.monotonic() + drain_secs
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(drain_secs + 60)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    # The thread.

    def _serve(self) -> None:
        try:
            if self._warm:
                self._compile_all()
            self.ready.set()
            while self._round():
                pass
        except Exception as error:
            _log.exception("the engine has stopped")
            with self._changed:
                self._closing = True
                waiting = [*self._waiting]
                self._waiting.clear()
            self._fail_all(f"the engine has stopped: {shortly(error)}", waiting)

    def _compile_all(self) -> None:
        """Runs every program once: each number of rows, each length of a piece."""
        row = device.empty(**self._how, n_rows=1)
        for length in _PIECES:
            tokens_bt = np.zeros((1, length), np.int32)
            device.read_and_score(self._params, row, tokens_bt, **self._how)
            row = device.read(self._params, row, tokens_bt, **self._how)
            if self._closing:
                return
        for n_rows in self._counts:
            self._resize(n_rows)
            self._rows = device.put(self._rows, row, np.int32(0))
            self._choose()
            if self._closing:
                return
        for n_rows in reversed(self._counts[:-1]):
            self._resize(n_rows)
        jax.block_until_ready(self._rows)

    def _round(self) -> bool:
        """Serves a little; False at the end."""
        with self._changed:
            while not (self._waiting or self._busy()):
                if self._closing:
                    return False
                self._changed.wait()
            for sequence in [s for s in self._waiting if self._is_over(s)]:
                self._waiting.remove(sequence)
            while self._waiting and len(self._reading) + self._n_decoding() < self.max_batch:
                self._reading.append(self._waiting.popleft())
            n_waiting = len(self._waiting)
        try:
            self._drop()
            self._read_pieces()
            self._step()
        except Exception as error:  # out of memory, above all: these requests fail, others may not
            _log.exception("a step failed")
            self._fail_all(f"the step failed: {shortly(error)}")
        self._observer.round(
            n_waiting, len(self._reading), self._n_decoding(), self._prefixes.bytes
        )
        return True

    def _busy(self) -> bool:
        return bool(self._reading or self._n_decoding() or self._under_way)

    def _n_decoding(self) -> int:
        return sum(sequence is not None for sequence in self._places)

    def _is_over(self, sequence: Sequence) -> bool:
        """Ends a sequence that nobody waits for any more, or that has waited too long."""
        if sequence.ended:
            return True
        if sequence.cancelled:
            sequence.end(Failed("cancelled", "the client has gone"))
        elif time.monotonic() > self._drain_until:
            sequence.end(Failed("stopping", "the server is stopping"))
        elif time.monotonic() > sequence.deadline:
            sequence.end(Failed("timeout", "the request took longer than the server allows"))
        return sequence.ended

    def _drop(self) -> None:
        """Frees the places of those that are over."""
        for sequence in [s for s in self._reading if self._is_over(s)]:
            self._reading.remove(sequence)
        for place, sequence in enumerate(self._places):
            if sequence is not None and self._is_over(sequence):
                self._places[place] = None

    def _read_pieces(self) -> None:
        """Reads prompts in turns, up to the budget of a round, and lets those read join."""
        budget = PIECE_TOKENS
        while self._reading and budget > 0:
            sequence = self._reading[0]  # until all has gone well: a failure must find it here
            if sequence.row is None and any(
                other.row is not None and other.asked.tokens is sequence.asked.tokens
                for other in self._reading
            ):
                # Another choice of the same prompt, whose snapshot will do for this one.
                self._reading.rotate(-1)
                continue
            budget -= self._read_piece(sequence, budget)
            if sequence.n_read < len(sequence.asked.tokens):
                self._reading.rotate(-1)
                continue
            if sequence.scored:
                sequence.tell(Scored(tuple(sequence.scored)))
            if sequence.asked.max_tokens:
                self._join(sequence)
            else:
                sequence.finish_unasked()
            self._reading.popleft()

    def _read_piece(self, sequence: Sequence, budget: int) -> int:
        """Reads the next piece of a prompt, of up to ``budget`` tokens; returns how many."""
        asked = sequence.asked
        row = sequence.row
        if row is None:
            if not asked.score_prompt:
                row, sequence.n_read, sequence.cut = self._prefixes.find(asked.tokens)
                sequence.n_cached = sequence.n_read
            row = row or device.empty(**self._how, n_rows=1)
            sequence.row = row
        start = sequence.n_read
        # A marker alone predicts a prompt's first token, and nothing the marker.
        stop = sequence.cut if sequence.cut > start else len(asked.tokens)
        if stop == start:  # the whole prompt was there
            return 0
        length = next(length for length in _PIECES if length <= min(stop - start, budget))
        tokens_bt = asked.tokens[None, start : start + length]
        if asked.score_prompt:
            row, told = device.read_and_score(self._params, row, tokens_bt, **self._how)
            told = jax.tree.map(np.asarray, told)
            sequence.scored += [
                _told(told, i, int(token), asked.logprobs or 0)
                if start + i
                else Told(int(token), None)
                for i, token in enumerate(tokens_bt[0])
            ]
        else:
            row = device.read(self._params, row, tokens_bt, **self._how)
        sequence.row = row
        sequence.n_read += length
        if sequence.n_read in (sequence.cut, len(asked.tokens)) and not asked.score_prompt:
            self._prefixes.keep(asked.tokens[: sequence.n_read], row)
        return length

    def _join(self, sequence: Sequence) -> None:
        if None not in self._places:
            self._resize(next(n for n in self._counts if n > len(self._places)))
        place = self._places.index(None)
        self._rows = device.put(self._rows, sequence.row, np.int32(place))
        self._places[place] = sequence
        sequence.row = None

    def _resize(self, n_rows: int) -> None:
        """Gives the batch another number of rows, moving those in use to the front."""
        places = [place for place, sequence in enumerate(self._places) if sequence is not None]
        padding = [0] * (n_rows - len(places))
        self._rows = device.take(self._rows, np.array(places + padding, np.int32))
        self._places = [*(self._places[place] for place in places), *[None] * len(padding)]

    def _step(self) -> None:
        """Starts the next step, then reads the tokens of the one before."""
        smaller = [n for n in self._counts if n < len(self._places)]
        # Two sizes down, lest a batch that comes and goes is copied at each step.
        if len(smaller) > 1 and self._n_decoding() <= smaller[-2]:
            self._resize(smaller[-1])
        started = None
        if self._n_decoding():
            started = list(self._places), *self._choose()
            for place, sequence in enumerate(self._places):
                if sequence is not None:
                    sequence.n_chosen += 1
                    if sequence.n_chosen == sequence.asked.max_tokens:
                        self._places[place] = None
        before, self._under_way = self._under_way, started
        if before is not None:
            self._tell(*before)

    def _choose(self) -> tuple[jax.Array, Any]:
        """Starts the choice of every row's next token; returns them and their log-probabilities."""
        tell: Any = np.bool_(_want_logprobs(self._places))
        token_b, told, self._rows = device.step(
            self._params, self._rows, self._choosing(), tell, **self._how
        )
        return token_b, told

    def _choosing(self) -> Choosing:
        asked = [_IDLE if sequence is None else sequence.asked for sequence in self._places]

        def column(name: str, dtype: Any) -> Any:
            return np.array([getattr(each, name) for each in asked], dtype)

        position_b: Any = np.array(
            [s.n_chosen if s is not None else 0 for s in self._places], np.int32
        )
        return Choosing(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("seed", np.uint32),
            position_b,
        )

    def _tell(self, places: list[Sequence | None], token_b: jax.Array, told: Any) -> None:
        """Gives each sequence its token of a step, and frees the places of those that ended."""
        tokens = np.asarray(token_b).tolist()
        told = jax.tree.map(np.asarray, told) if _want_logprobs(places) else None
        now = time.monotonic()
        for place, sequence in enumerate(places):
            if sequence is None or sequence.ended:
                continue
            if sequence.n_new == 0:
                self._observer.first_token(now - sequence.arrived)
            else:
                self._observer.next_token(now - sequence.last_time)
            sequence.last_time = now
            token = tokens[place]
            n_top = sequence.asked.logprobs
            sequence.take(Told(token, None) if n_top is None else _told(told, place, token, n_top))
            if sequence.ended and sequence in self._places:
                self._places[self._places.index(sequence)] = None

    def _fail_all(self, why: str, waiting: list[Sequence] | None = None) -> None:
        """Ends every request under way, and those ``waiting``; nothing of the device's state is
        trusted any more."""
        under_way = [*(waiting or ()), *self._reading, *filter(None, self._places)]
        under_way += filter(None, self._under_way[0] if self._under_way else [])
        self._reading.clear()
        self._prefixes.clear()
        self._places, self._under_way = [None], None
        for sequence in dict.fromkeys(under_way):
            if not sequence.ended:
                sequence.end(Failed("error", why))
        self._rows = device.empty(**self._how, n_rows=1)


def _told(told: Any, row: int, token: int, n_top: int) -> Told:
    top = zip(told.top_ids_bm[row, :n_top].tolist(), told.top_bm[row, :n_top].tolist(), strict=True)
    return Told(token, float(told.chosen_b[row]), tuple(top))


def _want_logprobs(places: list[Sequence | None]) -> bool:
    return any(s is not None and s.asked.logprobs is not None for s in places)
