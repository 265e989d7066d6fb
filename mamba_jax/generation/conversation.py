"""A conversation that keeps its recurrent state: each token is processed once.

Between two turns the model's state covers the conversation so far; its size is fixed. The text is
that of ``generation.chat``. An answer may end because the model starts the user's turn itself; its
tokens then begin the next turn. Otherwise "\\n\\nuser:" is prefilled with the next turn. The
end-of-text token is never fed to the model: what follows it is another document, and the model
would forget the conversation.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import StreamDecoder, Tokenizer
from mamba_jax.generation.chat import ANSWER, STOP
from mamba_jax.generation.ensemble import Model, mean_logits
from mamba_jax.generation.generate import empty_cache, prefill, prepare
from mamba_jax.generation.sampling import Sampling, sample
from mamba_jax.generation.stops import StopFinder
from mamba_jax.models import build

# Prefill chunk sizes of a turn, largest first and without padding, because padding would change the
# state. Few, as each is compiled; an answer's tokens use the last one too.
CHUNK_LENGTHS = (1024, 128, 16, 1)


class Conversation:
    """Turns of a user and a model.

    The first answer is that of ``generate_text`` to the same text, as the first of its prompts.
    """

    def __init__(
        self,
        params: build.Params,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling,
        max_tokens: int,
        seed: int = 0,
        system: str = "",
        stops: Sequence[str] = (),
        head: str = "exact",
        others: Sequence[Model] = (),
    ):
        """Starts an empty conversation.

        Args:
          params: parameters, as ``models.build`` makes them.
          model_config: the structure they were made with.
          tokenizer: the one that the model was trained with.
          sampling: how tokens are chosen.
          max_tokens: per answer, ≥ 1.
          seed: 0 … 2³² - 1; the same turns with the same seed get the same answers.
          system: what comes before the first turn; "": nothing.
          stops: end an answer, besides "\\n\\nuser:"; they are not shown, but stay in the state.
          head: as in ``generate_text``.
          others: further models of an ensemble.

        Raises:
          UserError: if the models' tokenizers differ.
        """
        model = Model(params, model_config, tokenizer)
        self._params, self._configs = prepare((model, *others), head)
        self._tokenizer = tokenizer
        self._sampling, self._max_tokens = sampling, max_tokens
        self._key = jax.random.fold_in(jax.random.key(seed), 0)  # as of a first prompt
        self._system = system
        self._stops = (STOP, *stops)
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self._caches = tuple(empty_cache(config, 1) for config in self._configs)
        self._pending = np.array([self._tokenizer.eot_id], np.int32)  # begins a document
        self._answer = ""  # the model's last, with the part of a stop that it wrote
        self._started = False
        self._n_chosen = 0

    def say(self, text: str) -> Iterator[str]:
        """Takes a turn of the user and answers it.

        Args:
          text: the user's text in one turn.

        Yields:
          The new text of each token: whole characters, no part of a stop, possibly "". A caller
          that stops iterating ends the answer there and may call ``say`` again; after an exception
          from this generator, call ``reset`` first.
        """
        turn = self._tokenizer.encode(f"{self._opening()} {text}\n\n{ANSWER}")
        self._pending = np.concatenate([self._pending, turn])
        self._started, self._answer = True, ""
        decoder, finder = StreamDecoder(self._tokenizer), StopFinder(self._stops)
        first = True
        for _ in range(self._max_tokens):
            token = self._next()
            if token == self._tokenizer.eot_id:
                break
            before, new = self._answer, decoder.push(token)
            self._answer += new
            self._pending = np.array([token], np.int32)
            shown = finder.push(new)
            ended = finder.found is not None
            if ended and (finder.beyond or decoder.holds_back):
                # The token continues past the stop; that text must not begin the user's turn.
                kept = new.removesuffix(finder.beyond)
                self._answer, self._pending = before + kept, self._tokenizer.encode(kept)
            if first and shown:  # which the text has between role and answer
                shown, first = shown.removeprefix(" "), False
            yield shown
            if ended:
                return
        yield finder.flush()

    def _opening(self) -> str:
        """Returns what the conversation lacks before " " and the user's text."""
        if self._started:
            n_written = next(n for n in range(len(STOP), -1, -1) if self._answer.endswith(STOP[:n]))
            return STOP[n_written:]
        user = STOP.lstrip()
        return f"system: {self._system}\n\n{user}" if self._system else user

    def _next(self) -> int:
        """Prefills the pending tokens and chooses the next one."""
        logits_mbv: tuple[jax.Array, ...] = ()
        for length in exact_chunks(len(self._pending)):
            chunk_bt, self._pending = self._pending[None, :length], self._pending[length:]
            logits_mbv, self._caches = zip(
                *(
                    prefill(params, config, chunk_bt, cache)
                    for params, config, cache in zip(
                        self._params, self._configs, self._caches, strict=True
                    )
                ),
                strict=True,
            )
        token = _choose(
            logits_mbv,
            self._key,
            self._n_chosen,
            sampling=self._sampling,
            vocab_size=self._tokenizer.vocab_size,
        )
        self._n_chosen += 1
        return int(token)


def exact_chunks(n_tokens: int) -> list[int]:
    """Cuts ``n_tokens`` into chunks of the lengths in ``CHUNK_LENGTHS``, without a remainder."""
    lengths = []
    for length in CHUNK_LENGTHS:
        n_chunks, n_tokens = divmod(n_tokens, length)
        lengths += [length] * n_chunks
    return lengths


@functools.partial(jax.jit, static_argnames=("sampling", "vocab_size"))
def _choose(
    logits_mbv: tuple[Float[Array, "b v"], ...],
    key: PRNGKeyArray,
    step: Int[Array, ""],
    *,
    sampling: Sampling,
    vocab_size: int,
) -> Int[Array, ""]:
    """Draws a token of one row, with the randomness that ``_decode`` gives this step."""
    keys_b = jax.random.fold_in(key, step)[None]
    return sample(mean_logits(logits_mbv, vocab_size), keys_b, sampling)[0]
