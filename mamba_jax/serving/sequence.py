"""One request under way: what was asked, what it has been given, and how its text comes about."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from mamba_jax.data.tokenizers.base import StreamDecoder, Tokenizer
from mamba_jax.generation.stops import StopFinder
from mamba_jax.serving.rows import Rows


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
      tokens: int32 (t,), t ≥ 1: the prompt, begun as training begins a document.
      max_tokens: new ones, ≥ 0.
      temperature: as in ``generation.Sampling``, likewise ``top_k`` and ``top_p``.
      seed: 0 … 2³² - 1; a text depends on its prompt, its settings and this alone.
      stops: texts that end the text and are not part of it.
      logprobs: tell that of each token, and of so many likeliest ones; None: tell none.
      score_prompt: tell those of the prompt's tokens as well.
      marked: the first token is the marker alone, which the prompt itself does not have.
      prompt_chars: length of the text that the new text follows.
    """

    tokens: np.ndarray
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    marked: bool = True
    prompt_chars: int = 0


@dataclasses.dataclass(frozen=True)
class Told:
    """A token and its log-probability.

    Attributes:
      token: its id.
      logprob: natural logarithm; None for the first token of a prompt, which nothing predicts.
      top: ids and log-probabilities of the likeliest tokens, likeliest first.
      start: index, in the prompt's text and the new text behind it, of the character that the
        token's first byte belongs to.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Scored:
    """Event: the prompt's tokens, the first included."""

    tokens: tuple[Told, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """Event: more text, and the tokens that made it if log-probabilities were asked for."""

    text: str
    tokens: tuple[Told, ...] = ()


@dataclasses.dataclass(frozen=True)
class End:
    """Event: the last one of a request that was served."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int  # of the prompt, whose state was there already
    new_tokens: int  # the one that ends a document included


@dataclasses.dataclass(frozen=True)
class Failed:
    """Event: the last one of a request that was not."""

    reason: Literal["timeout", "cancelled", "stopping", "error"]
    message: str


Event = Scored | Text | End | Failed


class Sequence:
    """A request between its arrival and its end. The engine's thread alone changes it, but for
    ``cancelled``."""

    def __init__(
        self,
        asked: Asked,
        deliver: Callable[[Event], None],
        on_end: Callable[["Sequence", End | Failed], None],
        tokenizer: Tokenizer,
        timeout_secs: float,
    ):
        """Takes what was asked, who is told of it, and who is told of its end besides."""
        self.asked = asked
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout_secs
        self.cancelled = False
        self.ended = False
        self.row: Rows | None = None  # while the prompt is read
        self.n_read = 0
        self.n_cached = 0
        self.continues_answer = False  # its prompt begins with a prompt and the answer to it
        self.is_rest = False  # nobody asked: the end of an answer is read for the next turn
        self.cut = 0  # keep a snapshot there as well
        self.scored: list[Told] = []
        self.n_chosen = 0  # on the device, told or not
        self.n_new = 0
        self.new_tokens: list[int] = []  # those told, without the one that ends a document
        self.kept: np.ndarray | None = None  # the tokens of the newest snapshot of the answer
        self.last_time = 0.0  # of the last token told
        self.tell = deliver
        self._on_end = on_end
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopFinder(asked.stops)
        self._held: list[Told] = []  # tokens whose text is held back
        self._n_shown = 0

    def take(self, told: Told) -> None:
        """Takes the next token in, which may be the last."""
        self.n_new += 1
        is_end = told.token == self._tokenizer.eot_id
        if not is_end:
            self.new_tokens.append(told.token)
        text = self._decoder.push(told.token)
        if self.asked.logprobs is not None:
            start = self.asked.prompt_chars + self._decoder.start
            self._held.append(dataclasses.replace(told, start=start))
        if is_end:
            self._finish("stop")
            return
        self._show(self._stops.push(text))
        if self._stops.found is not None:
            self.end(End("stop", *self._counts()))
        elif self.n_new == self.asked.max_tokens:
            self._finish("length")

    def all_tokens(self) -> np.ndarray:
        """Returns the prompt's tokens and those told, int32 (t,)."""
        return np.concatenate([self.asked.tokens, np.array(self.new_tokens, np.int32)])

    def finish_unasked(self) -> None:
        """Ends a request for no token."""
        self._finish("length")

    def end(self, event: End | Failed) -> None:
        """Tells the last event."""
        self.ended = True
        self.row = None
        self._on_end(self, event)
        self.tell(event)

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._show(self._stops.flush(), everything=True)
        self.end(End(reason, *self._counts()))

    def _show(self, text: str, everything: bool = False) -> None:
        """Tells text, with the tokens that begin in it."""
        self._n_shown += len(text)
        end = self.asked.prompt_chars + self._n_shown
        shown = tuple(told for told in self._held if everything or told.start < end)
        self._held = self._held[len(shown) :]
        if text or shown:
            self.tell(Text(text, shown))

    def _counts(self) -> tuple[int, int, int]:
        return len(self.asked.tokens), self.n_cached, self.n_new
