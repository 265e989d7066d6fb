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

from mamba_jax.errors import UserError, first_line
from mamba_jax.generation.ensemble import Model
from mamba_jax.generation.generate import prepare
from mamba_jax.serving import rows as device
from mamba_jax.serving.observer import Observer
from mamba_jax.serving.prefix_cache import PrefixCache
from mamba_jax.serving.row_sampling import choosing_of
from mamba_jax.serving.rows import Rows
from mamba_jax.serving.sequence import Asked, Event, Failed, Scored, Sequence, Told
from mamba_jax.serving.warm_up import WarmUp

PIECE_TOKENS = device.PIECES[0]  # at most read of all prompts between two decoding steps
_MULTIPLE = device.SCORED_PIECES[-1]  # to which a prompt that nothing precedes is padded
KEEP_TOKENS = 16  # of an answer, from one snapshot of it to the next
_Snapshots = list[tuple[Sequence, Rows]]
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine takes no more requests."""


class WarmingUp(Exception):
    """The engine does not serve yet: it compiles its programs."""


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
        """Takes a model; ``start`` begins to serve.

        Args:
          model: in memory.
          max_batch: sequences that are read or decoded at a time.
          max_queue: requests that may wait besides.
          prefix_cache_bytes: for snapshots of states; 0: none.
          timeout_secs: from a request's arrival to its end.
          observer: is told what happens.
          log: is told in a line when it serves.

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
        (self._params,), _ = prepare((model,))
        self._how: dict[str, Any] = {
            "config": model.config,
            "vocab_size": model.tokenizer.vocab_size,
        }
        self._max_queue = max_queue
        self._timeout_secs = timeout_secs
        self._observer = observer or Observer()
        self._say = log
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._changed = threading.Condition()
        # Under the condition's lock:
        self._waiting: deque[Sequence] = deque()
        self._closing = False
        self._drain_until = float("inf")
        # Of the thread alone:
        self._reading: deque[Sequence] = deque()
        self._rests: deque[np.ndarray] = deque(maxlen=max_batch)  # ends of answers to be read
        self._places: list[Sequence | None] = [None]  # row → its sequence
        self._rows = device.empty(**self._how, n_rows=1)
        self._under_way: tuple[list[Sequence | None], jax.Array, Any, _Snapshots] | None = None
        self.warm_up = WarmUp(self._params, self._how, self._counts)

    # Called by any thread.

    def start(self, warm_up: bool = True) -> None:
        """Starts the thread; ``ready`` is set when all programs are compiled.

        Without ``warm_up`` it is at once, and programs are compiled when they are needed.
        """
        if not warm_up:
            self.ready.set()
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
          WarmingUp: before ``ready`` is set.
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
            if not self.ready.is_set():
                raise WarmingUp
            # What has a free row does not really wait.
            free = max(self.max_batch - self._n_served(), 0)
            if len(self._waiting) + len(made) > self._max_queue + free:
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
            if not self.ready.is_set():
                self.warm_up.run(lambda: self._closing)
                if self._closing:
                    return
                done = self.warm_up.n_compiled, self.warm_up.secs
                self._observer.warmed_up(*done)
                self._say("ready: compiled {} programs in {:.1f} s".format(*done))
                self.ready.set()
            while self._round():
                pass
        except Exception as error:
            _log.exception("the engine has stopped")
            with self._changed:
                self._closing = True
                waiting = [*self._waiting]
                self._waiting.clear()
            self._fail_all(f"the engine has stopped: {first_line(error)}", waiting)

    def _round(self) -> bool:
        """Serves a little; False at the end."""
        with self._changed:
            while not (self._waiting or self._busy()):
                if self._closing:
                    return False
                self._changed.wait()
            for sequence in [s for s in self._waiting if self._is_over(s)]:
                self._waiting.remove(sequence)
            while self._waiting and self._n_served() < self.max_batch:
                self._reading.append(self._waiting.popleft())
            n_waiting = len(self._waiting)
            is_idle = not (self._reading or self._closing)  # those waiting would be reading
        try:
            if self._rests and is_idle:
                self._read_rest()
            self._drop()
            self._read_pieces()
            self._step()
        except Exception as error:  # out of memory, above all: these requests fail, others may not
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
        has_rests = self._rests and not self._closing
        return bool(self._reading or self._n_decoding() or self._under_way or has_rests)

    def _n_decoding(self) -> int:
        return sum(sequence is not None for sequence in self._places)

    def _n_served(self) -> int:
        """How many sequences that somebody waits for are read or decoded."""
        return sum(not sequence.is_rest for sequence in self._reading) + self._n_decoding()

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
                found = self._prefixes.find(asked.tokens)
                row, sequence.n_read, sequence.cut = found.row, found.n_tokens, found.n_common
                sequence.n_cached = sequence.n_read
                sequence.continues_answer = found.is_answer
            row = row or device.empty(**self._how, n_rows=1)
            sequence.row = row
        start = sequence.n_read
        # A marker alone predicts a prompt's first token, and nothing the marker.
        stop = sequence.cut if sequence.cut > start else len(asked.tokens)
        if stop == start:  # the whole prompt was there
            return 0
        n_padding = -(stop - start) % _MULTIPLE if start == 0 else 0
        most = min(n_padding + stop - start, max(budget, _MULTIPLE))
        length = next(length for length in device.PIECES if length <= most)
        n_new = length - n_padding
        tokens_bt = np.pad(asked.tokens[None, start : start + n_new], ((0, 0), (n_padding, 0)))
        segments_bt = np.pad(np.ones((1, n_new), np.int32), ((0, 0), (n_padding, 0)))
        before_bv = row.logits_bv
        row, x_btd = device.read(self._params, row, tokens_bt, segments_bt, **self._how)
        if asked.score_prompt:
            told = device.score(self._params, before_bv, x_btd, tokens_bt, **self._how)
            told = jax.tree.map(np.asarray, told)
            sequence.scored += [
                _told(told, n_padding + i, int(token), asked.logprobs or 0)
                if start + i
                else Told(int(token), None)
                for i, token in enumerate(asked.tokens[start : start + n_new])
            ]
        sequence.row = row
        sequence.n_read += n_new
        if sequence.n_read in (sequence.cut, len(asked.tokens)) and not asked.score_prompt:
            is_answer = sequence.is_rest and sequence.n_read == len(asked.tokens)
            self._prefixes.keep(asked.tokens[: sequence.n_read], row, is_answer=is_answer)
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
            snapshots: _Snapshots = []
            started = list(self._places), *self._choose(), snapshots
            for place, sequence in enumerate(self._places):
                if sequence is not None:
                    sequence.n_chosen += 1
                    is_last = sequence.n_chosen == sequence.asked.max_tokens
                    if self._prefixes.max_bytes and (
                        is_last or sequence.n_chosen % KEEP_TOKENS == 0
                    ):
                        snapshots.append((sequence, device.copy(self._rows, np.int32(place))))
                    if is_last:
                        self._places[place] = None
        before, self._under_way = self._under_way, started
        if before is not None:
            self._tell(*before)

    def _choose(self) -> tuple[jax.Array, Any]:
        """Starts the choice of every row's next token; returns them and their log-probabilities."""
        tell: Any = np.bool_(_want_logprobs(self._places))
        choosing = choosing_of(
            [sequence and sequence.asked for sequence in self._places],
            [sequence.n_chosen if sequence else 0 for sequence in self._places],
        )
        token_b, told, self._rows = device.step(
            self._params, self._rows, choosing, tell, **self._how
        )
        return token_b, told

    def _tell(
        self,
        places: list[Sequence | None],
        token_b: jax.Array,
        told: Any,
        snapshots: _Snapshots,
    ) -> None:
        """Gives each sequence its token of a step, and frees the places of those that ended."""
        rows = {id(sequence): row for sequence, row in snapshots}
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
            self._keep_answer(sequence, rows.get(id(sequence)))
            if sequence.ended and sequence in self._places:
                self._places[self._places.index(sequence)] = None

    def _keep_answer(self, sequence: Sequence, row: Rows | None) -> None:
        """Keeps the state behind an answer, from which the next turn of a chat continues.

        When the host learns that a text has ended, the device has read one token more. So a row is
        copied every ``KEEP_TOKENS`` tokens, and the rest is read when nobody waits.
        """
        is_end_read = len(sequence.new_tokens) < sequence.n_new
        if row is not None and not is_end_read:
            tokens = sequence.all_tokens()
            self._prefixes.keep(tokens, row, is_answer=True, replaces=sequence.kept)
            sequence.kept = tokens
        if sequence.ended and self._prefixes.max_bytes:
            self._rests.append(sequence.all_tokens())

    def _read_rest(self) -> None:
        """Begins to read what an answer holds after its newest snapshot, if that is still kept."""
        tokens = self._rests.popleft()
        if 0 < len(tokens) - self._prefixes.find(tokens).n_tokens <= KEEP_TOKENS:
            rest = Asked(tokens, max_tokens=0)
            nobody = lambda *_: None
            sequence = Sequence(rest, nobody, nobody, self.tokenizer, self._timeout_secs)
            sequence.is_rest = True
            self._reading.append(sequence)

    def _fail_all(self, why: str, waiting: list[Sequence] | None = None) -> None:
        """Ends every request under way, and those ``waiting``; nothing of the device's state is
        trusted any more."""
        under_way = [*(waiting or ()), *self._reading, *filter(None, self._places)]
        under_way += filter(None, self._under_way[0] if self._under_way else [])
        self._reading.clear()
        self._rests.clear()
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
