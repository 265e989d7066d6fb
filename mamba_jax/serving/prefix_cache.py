"""The prefix cache: recurrent states after prefixes of prompts.

A recurrent model summarises the past in one state of fixed size, so a prompt that shares a prefix
with an earlier one continues from the state after it, however long the prefix is. Unlike an
attention cache, a state cannot be truncated. So states are cached where prompts end, where answers
end (the next turn of a chat begins with both), and where a prompt was found to diverge from an
earlier one, for the next prompt with the same prefix.
"""

import collections
from typing import NamedTuple

import numpy as np

from mamba_jax.serving.slots import Slots, state_bytes

CACHE_EVERY_TOKENS = 16  # tokens of an answer between two of its entries
_MIN_TOKENS = 16  # prefilling a shorter prefix is faster than looking it up
_MAX_ENTRIES = 1024  # a prompt is compared with each


class Match(NamedTuple):
    """The longest cached prefix of a prompt."""

    state: Slots | None  # after the longest entry that begins the prompt
    n_tokens: int  # tokens that the state covers
    n_common: int  # tokens shared with the closest entry; 0: too few to matter
    is_answer: bool  # the state follows an answer, not a prompt


class _Entry(NamedTuple):
    state: Slots
    is_answer: bool


class PrefixCache:
    """States by the tokens before them; evicts the least recently used."""

    def __init__(self, max_bytes: int):
        """Holds states and their tokens up to ``max_bytes``; 0 disables the cache."""
        self.max_bytes = max_bytes
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: np.ndarray) -> Match:
        """Finds the longest cached prefix of a prompt, int32 (t,).

        Also returns where the prompt diverges from the entry that shares most of it.
        """
        best, longest = None, 0
        for key in self._entries:
            known = np.frombuffer(key, np.int32)
            common = _common(known, tokens)
            longest = max(longest, common)
            if common == len(known) and (best is None or len(key) > len(best)):
                best = key
        longest = longest if longest >= _MIN_TOKENS else 0
        if best is None:
            return Match(None, 0, longest, False)
        self._entries.move_to_end(best)
        entry = self._entries[best]
        return Match(entry.state, len(best) // 4, longest, entry.is_answer)

    def add(
        self,
        tokens: np.ndarray,
        state: Slots,
        *,
        is_answer: bool = False,
        replaces: np.ndarray | None = None,
    ) -> None:
        """Caches the state after ``tokens``, int32 (t,), if worth it and not too large.

        Args:
          tokens: those of a prompt, or of a prompt and its answer.
          state: after them.
          is_answer: whether the tokens end with an answer.
          replaces: the tokens of an entry that this one supersedes, if any.
        """
        if replaces is not None and replaces.tobytes() in self._entries:
            self._remove(replaces.tobytes())
        key = tokens.tobytes()
        size = state_bytes(state) + len(key)
        if len(tokens) < _MIN_TOKENS or key in self._entries or size > self.max_bytes:
            return
        self._entries[key] = _Entry(state, is_answer)
        self.bytes += size
        while self.bytes > self.max_bytes or len(self._entries) > _MAX_ENTRIES:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: bytes) -> None:
        self.bytes -= state_bytes(self._entries.pop(key).state) + len(key)

    def clear(self) -> None:
        """Removes all entries."""
        self._entries.clear()
        self.bytes = 0


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the length of the common prefix."""
    n = min(len(a), len(b))
    differing = a[:n] != b[:n]
    first = int(differing.argmax()) if n else 0
    return first if n and differing[first] else n
