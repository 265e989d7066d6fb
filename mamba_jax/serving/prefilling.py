"""The prompts being prefilled, chunk by chunk, and the prefix cache that they start from."""

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.models import build
from mamba_jax.serving import slots as device
from mamba_jax.serving.prefix_cache import CACHE_EVERY_TOKENS, PrefixCache
from mamba_jax.serving.sequence import GenerationRequest, PromptLogprobs, Sequence, TokenLogprob
from mamba_jax.serving.slots import Slots

BUDGET_TOKENS = device.PREFILL_CHUNKS[0]  # prompt tokens prefilled between two decoding steps
_PAD_MULTIPLE = device.LOGPROB_CHUNKS[-1]  # a prompt without a cached prefix is padded to it


class Prefilling:
    """The sequences being prefilled; for the engine thread.

    Attributes:
      sequences: in turn.
      prefixes: the prefix cache.
      tails: answers whose last tokens are to be prefilled, so that the next turn finds them cached.
    """

    def __init__(
        self,
        params: build.Params,
        model_args: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        max_tails: int,
        prefix_cache_bytes: int,
        timeout_secs: float,
    ):
        self._params, self._model_args = params, model_args
        self._tokenizer = tokenizer
        self._timeout_secs = timeout_secs
        self.sequences: deque[Sequence] = deque()
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self.tails: deque[np.ndarray] = deque(maxlen=max_tails)

    @property
    def n_requests(self) -> int:
        """How many of the sequences are requests of clients."""
        return sum(not sequence.is_tail for sequence in self.sequences)

    def release(self, is_over: Callable[[Sequence], bool]) -> None:
        """Removes the sequences that are over."""
        for sequence in [s for s in self.sequences if is_over(s)]:
            self.sequences.remove(sequence)

    def clear(self) -> list[Sequence]:
        """Removes and returns all sequences; empties the cache."""
        removed = [*self.sequences]
        self.sequences.clear()
        self.tails.clear()
        self.prefixes.clear()
        return removed

    def round(self, insert: Callable[[Sequence], None]) -> None:
        """Prefills prompts round-robin, up to the budget.

        Args:
          insert: called with each sequence whose prompt is complete and that is to be decoded.
        """
        budget = BUDGET_TOKENS
        while self.sequences and budget > 0:
            sequence = self.sequences[0]  # removed on success only, so that clear returns it
            if sequence.state is None and any(
                other.state is not None and other.request.tokens is sequence.request.tokens
                for other in self.sequences
            ):
                # Another choice of the same prompt is being prefilled: wait for its cache entry.
                self.sequences.rotate(-1)
                continue
            budget -= self._chunk(sequence, budget)
            if sequence.n_prefilled < len(sequence.request.tokens):
                self.sequences.rotate(-1)
                continue
            if sequence.prompt_logprobs:
                sequence.emit(PromptLogprobs(tuple(sequence.prompt_logprobs)))
            if sequence.request.max_tokens:
                insert(sequence)
            else:
                sequence.finish_without_tokens()
            self.sequences.popleft()

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Prefills the next chunk of a prompt; returns its length, at most about ``budget``."""
        request = sequence.request
        state = sequence.state
        if state is None:
            if not request.prompt_logprobs:
                match = self.prefixes.find(request.tokens)
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
                TokenLogprob.of(logprobs, n_padding + i, int(token), request.logprobs or 0)
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
            self.prefixes.add(request.tokens[: sequence.n_prefilled], state, is_answer=is_answer)
        return length

    def cache_answer(self, sequence: Sequence, state: Slots | None) -> None:
        """Caches the state after an answer, from which the next turn of a chat continues.

        When the host finds that a text has ended, the device has already processed one more token.
        So the state is copied every ``CACHE_EVERY_TOKENS`` tokens, and the last tokens are
        prefilled when no request waits.
        """
        ends_document = len(sequence.new_tokens) < sequence.n_new
        if state is not None and not ends_document:
            tokens = sequence.all_tokens()
            self.prefixes.add(tokens, state, is_answer=True, replaces=sequence.cached_answer)
            sequence.cached_answer = tokens
        if sequence.ended and self.prefixes.max_bytes:
            self.tails.append(sequence.all_tokens())

    def start_tail(self) -> None:
        """Starts to prefill an answer's tokens after its newest cache entry, if it still exists."""
        tokens = self.tails.popleft()
        if 0 < len(tokens) - self.prefixes.find(tokens).n_tokens <= CACHE_EVERY_TOKENS:
            tail = GenerationRequest(tokens, max_tokens=0)
            ignore = lambda *_: None
            sequence = Sequence(tail, ignore, ignore, self._tokenizer, self._timeout_secs)
            sequence.is_tail = True
            self.sequences.append(sequence)
