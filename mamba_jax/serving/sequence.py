"""One request in progress: its settings, its events, and how its tokens become text."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from mamba_jax.data.tokenizers.base import StreamDecoder, Tokenizer
from mamba_jax.generation.stops import StopFinder
from mamba_jax.serving.slots import Logprobs, Slots


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One text to generate.

    Attributes:
      tokens: int32 (t,), t ≥ 1: the prompt; starts with the separator, as documents in training do.
      max_tokens: new tokens at most, ≥ 0.
      temperature: as in ``generation.Sampling``, likewise ``top_k`` and ``top_p``.
      seed: 0 … 2³² - 1; output depends only on the prompt, the settings and the seed.
      stops: stop strings: end the text and are not part of it.
      logprobs: report the logprob of each token and of this many most likely ones; None: report
        none.
      prompt_logprobs: report those of the prompt's tokens as well.
      separator_added: the first token is a separator that the client's prompt does not have.
      prompt_chars: length of the text before the new text.
    """

    tokens: np.ndarray
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    separator_added: bool = True
    prompt_chars: int = 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token and its logprob.

    Attributes:
      token: its id.
      logprob: natural logarithm; None for the first token of a prompt.
      top: ids and logprobs of the most likely tokens, in descending order.
      start: index, in the prompt's text followed by the new text, of the character that the token's
        first byte belongs to.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    start: int = 0

    @classmethod
    def of(cls, logprobs: Logprobs, slot: int, token: int, n_top: int) -> "TokenLogprob":
        """Takes a token's ``n_top`` most likely alternatives from logprobs on the host."""
        ids = logprobs.top_ids_bm[slot, :n_top].tolist()
        values = logprobs.top_bm[slot, :n_top].tolist()
        top = zip(ids, values, strict=True)
        return cls(token, float(logprobs.chosen_b[slot]), tuple(top))


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Event: the prompt's tokens, the first included."""

    tokens: tuple[TokenLogprob, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """Event: more text, and its tokens if logprobs were requested."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class End:
    """Event: a request was served. No event follows it."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose state came from the prefix cache
    new_tokens: int  # including the separator that ends a document


@dataclasses.dataclass(frozen=True)
class Failed:
    """Event: a request was not served. No event follows it."""

    reason: Literal["timeout", "cancelled", "stopping", "error"]
    message: str


Event = PromptLogprobs | Text | End | Failed


class Sequence:
    """A request from its arrival to its end. Only the engine thread changes it, except for
    ``cancelled``."""

    def __init__(
        self,
        request: GenerationRequest,
        deliver: Callable[[Event], None],
        on_end: Callable[["Sequence", End | Failed], None],
        tokenizer: Tokenizer,
        timeout_secs: float,
    ):
        """Takes the request, the receiver of its events, and a second receiver of its end."""
        self.request = request
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout_secs
        self.cancelled = False
        self.ended = False
        self.state: Slots | None = None  # while the prompt is prefilled
        self.n_prefilled = 0
        self.n_cached = 0
        self.continues_answer = False  # its prompt continues a cached prompt and answer
        self.is_tail = False  # internal: prefills the end of an answer for the next turn
        self.branch_at = 0  # add a prefix-cache entry there as well
        self.prompt_logprobs: list[TokenLogprob] = []
        self.n_chosen = 0  # sampled on the device
        self.n_new = 0
        self.new_tokens: list[int] = []  # without the separator that ends a document
        self.cached_answer: np.ndarray | None = None  # the tokens of its newest prefix-cache entry
        self.last_time = 0.0  # of the last token
        self.emit = deliver
        self._on_end = on_end
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopFinder(request.stops)
        self._pending: list[TokenLogprob] = []  # tokens whose text is not emitted yet
        self._n_shown = 0

    def append(self, token: TokenLogprob) -> None:
        """Appends the next token; may end the request."""
        self.n_new += 1
        is_end = token.token == self._tokenizer.eot_id
        if not is_end:
            self.new_tokens.append(token.token)
        text = self._decoder.push(token.token)
        if self.request.logprobs is not None:
            start = self.request.prompt_chars + self._decoder.start
            self._pending.append(dataclasses.replace(token, start=start))
        if is_end:
            self._finish("stop")
            return
        self._show(self._stops.push(text))
        if self._stops.found is not None:
            self.end(End("stop", *self._counts()))
        elif self.n_new == self.request.max_tokens:
            self._finish("length")

    def all_tokens(self) -> np.ndarray:
        """Returns the tokens of the prompt and of the answer, int32 (t,)."""
        return np.concatenate([self.request.tokens, np.array(self.new_tokens, np.int32)])

    def finish_without_tokens(self) -> None:
        """Ends a request with ``max_tokens=0``."""
        self._finish("length")

    def end(self, event: End | Failed) -> None:
        """Emits the last event."""
        self.ended = True
        self.state = None
        self._on_end(self, event)
        self.emit(event)

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._show(self._stops.flush(), everything=True)
        self.end(End(reason, *self._counts()))

    def _show(self, text: str, everything: bool = False) -> None:
        """Emits text, with the tokens that begin in it."""
        self._n_shown += len(text)
        end = self.request.prompt_chars + self._n_shown
        shown = tuple(each for each in self._pending if everything or each.start < end)
        self._pending = self._pending[len(shown) :]
        if text or shown:
            self.emit(Text(text, shown))

    def _counts(self) -> tuple[int, int, int]:
        return len(self.request.tokens), self.n_cached, self.n_new
