"""A conversation whose recurrent state is kept: no token of it is read twice.

Between two turns the model's state stands after what was said so far, of fixed size however long
that is. The text is that of ``generation.chat``. After an answer the model either has begun to
speak for the user itself, whose tokens are then the beginning of the next turn, or it ended in
another way, and "\\n\\nuser:" is read with the next turn. The end-of-text token is never read: what
follows it is another document, and the model would forget the conversation.
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

# A turn is read in these, largest first, because a state cannot be continued past padding. Few, as
# each is compiled; the last is that of an answer's tokens too.
PIECES = (1024, 128, 16, 1)


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
        """Begins with nothing said.

        Args:
          params: of ``models.build``.
          model_config: the structure they were made with.
          tokenizer: the one that the model was trained with.
          sampling: how tokens are chosen.
          max_tokens: of an answer, ≥ 1.
          seed: 0 … 2³² - 1; the same turns then get the same answers.
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
        """Forgets all that was said."""
        self._caches = tuple(empty_cache(config, 1) for config in self._configs)
        self._unread = np.array([self._tokenizer.eot_id], np.int32)  # begins a document
        self._answer = ""  # the model's last, with what it wrote of the stop
        self._begun = False
        self._n_chosen = 0

    def say(self, text: str) -> Iterator[str]:
        """Takes a turn of the user's, and answers.

        Args:
          text: of the user, in one turn.

        Yields:
          The answer as it comes, a piece for each token: whole characters, no part of a stop, maybe
          "". Whoever stops listening between two pieces has ended the answer there, and may go on
          with ``say``; after an exception from in here only ``reset`` helps.
        """
        turn = self._tokenizer.encode(f"{self._opening()} {text}\n\n{ANSWER}")
        self._unread = np.concatenate([self._unread, turn])
        self._begun, self._answer = True, ""
        decoder, finder = StreamDecoder(self._tokenizer), StopFinder(self._stops)
        first = True
        for _ in range(self._max_tokens):
            token = self._next()
            if token == self._tokenizer.eot_id:
                break
            before, new = self._answer, decoder.push(token)
            self._answer += new
            self._unread = np.array([token], np.int32)
            shown = finder.push(new)
            ended = finder.found is not None
            if ended and (finder.beyond or decoder.holds_back):
                # The token goes on: what lies beyond the stop would stand in the user's turn.
                said = new.removesuffix(finder.beyond)
                self._answer, self._unread = before + said, self._tokenizer.encode(said)
            if first and shown:  # which the text has between role and answer
                shown, first = shown.removeprefix(" "), False
            yield shown
            if ended:
                return
        yield finder.flush()

    def _opening(self) -> str:
        """Returns what the conversation lacks before " " and the user's text."""
        if self._begun:
            n_written = next(n for n in range(len(STOP), -1, -1) if self._answer.endswith(STOP[:n]))
            return STOP[n_written:]
        user = STOP.lstrip()
        return f"system: {self._system}\n\n{user}" if self._system else user

    def _next(self) -> int:
        """Reads what is unread, and chooses the token after it."""
        logits_mbv: tuple[jax.Array, ...] = ()
        for length in exact_pieces(len(self._unread)):
            piece_bt, self._unread = self._unread[None, :length], self._unread[length:]
            logits_mbv, self._caches = zip(
                *(
                    prefill(params, config, piece_bt, cache)
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


def exact_pieces(n_tokens: int) -> list[int]:
    """Cuts ``n_tokens`` into pieces of the lengths in ``PIECES``, without a rest."""
    lengths = []
    for length in PIECES:
        n_pieces, n_tokens = divmod(n_tokens, length)
        lengths += [length] * n_pieces
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
