"""Snapshots of the recurrent state at beginnings of prompts.

A recurrent model's whole past is one row of fixed size, so that a prompt that begins like an
earlier one continues from its row, however long the common part. A state cannot be cut back, as an
attention cache can; so rows are kept where prompts ended, where answers ended (the next turn of a
chat begins with both), and where a prompt was found to part from an earlier one, for the next that
shares this beginning.
"""

import collections
from typing import NamedTuple

import numpy as np

from mamba_jax.serving.rows import Rows, row_bytes

_SHORTEST = 16  # tokens: shorter beginnings are read sooner than looked up
_MAX_ROWS = 1024  # a prompt is compared with each


class Found(NamedTuple):
    """What a prompt begins with."""

    row: Rows | None  # of the longest beginning kept
    n_tokens: int  # that it has read
    n_common: int  # where the prompt parts from the one it follows longest; 0: too early to matter
    is_answer: bool  # the row stands after an answer, not after a prompt


class _Kept(NamedTuple):
    row: Rows
    is_answer: bool


class PrefixCache:
    """Rows by the tokens that they have read; the least recently used go first."""

    def __init__(self, max_bytes: int):
        """Keeps rows and their tokens up to ``max_bytes``; 0: none."""
        self.max_bytes = max_bytes
        self._rows: collections.OrderedDict[bytes, _Kept] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, tokens: np.ndarray) -> Found:
        """Looks for the longest beginning of a prompt, int32 (t,).

        Where the prompt parts from an earlier one, a row kept there would have served.
        """
        best, longest = None, 0
        for key in self._rows:
            known = np.frombuffer(key, np.int32)
            common = _common(known, tokens)
            longest = max(longest, common)
            if common == len(known) and (best is None or len(key) > len(best)):
                best = key
        longest = longest if longest >= _SHORTEST else 0
        if best is None:
            return Found(None, 0, longest, False)
        self._rows.move_to_end(best)
        kept = self._rows[best]
        return Found(kept.row, len(best) // 4, longest, kept.is_answer)

    def keep(
        self,
        tokens: np.ndarray,
        row: Rows,
        *,
        is_answer: bool = False,
        replaces: np.ndarray | None = None,
    ) -> None:
        """Keeps the row that has read ``tokens``, int32 (t,), if it is worth it and has room.

        Args:
          tokens: of a prompt, or of a prompt and its answer.
          row: after them.
          is_answer: they end with an answer.
          replaces: the tokens of a row that this one makes superfluous; None: of none.
        """
        if replaces is not None and replaces.tobytes() in self._rows:
            self._drop(replaces.tobytes())
        key = tokens.tobytes()
        size = row_bytes(row) + len(key)
        if len(tokens) < _SHORTEST or key in self._rows or size > self.max_bytes:
            return
        self._rows[key] = _Kept(row, is_answer)
        self.bytes += size
        while self.bytes > self.max_bytes or len(self._rows) > _MAX_ROWS:
            self._drop(next(iter(self._rows)))

    def _drop(self, key: bytes) -> None:
        self.bytes -= row_bytes(self._rows.pop(key).row) + len(key)

    def clear(self) -> None:
        """Lets all go."""
        self._rows.clear()
        self.bytes = 0


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Returns the length of the common beginning."""
    n = min(len(a), len(b))
    differing = a[:n] != b[:n]
    first = int(differing.argmax()) if n else 0
    return first if n and differing[first] else n
