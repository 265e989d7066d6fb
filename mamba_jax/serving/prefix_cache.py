"""Snapshots of the recurrent state at beginnings of prompts.

A recurrent model's whole past is one row of fixed size, so that a prompt that begins like an
earlier one goes on from its row, however long the common part. A state cannot be cut back, as an
attention cache can; so rows are kept where prompts ended, and where a prompt was found to part
from an earlier one, for the next that shares this beginning.
"""

import collections

import numpy as np

from mamba_jax.serving.rows import Rows, row_bytes

_SHORTEST = 16  # tokens: shorter beginnings are read sooner than looked up
_MAX_ROWS = 1024  # a prompt is compared with each


class PrefixCache:
    """Rows by the tokens that they have read; the least recently used go first."""

    def __init__(self, max_bytes: int):
        """Keeps rows and their tokens up to ``max_bytes``; 0: none."""
        self._max_bytes = max_bytes
        self._rows: collections.OrderedDict[bytes, Rows] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, tokens: np.ndarray) -> tuple[Rows | None, int, int]:
        """Looks for the longest beginning of a prompt.

        Args:
          tokens: int32 (t,).

        Returns:
          The row of the longest beginning kept (None: none), its length, and where the prompt
          parts from the earlier one that it follows longest (0: too early to matter): a row kept
          there would have served.
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
            return None, 0, longest
        self._rows.move_to_end(best)
        return self._rows[best], len(best) // 4, longest

    def keep(self, tokens: np.ndarray, row: Rows) -> None:
        """Keeps the row that has read ``tokens``, int32 (t,), if it is worth it and has room."""
        key = tokens.tobytes()
        size = row_bytes(row) + len(key)
        if len(tokens) < _SHORTEST or key in self._rows or size > self._max_bytes:
            return
        self._rows[key] = row
        self.bytes += size
        while self.bytes > self._max_bytes or len(self._rows) > _MAX_ROWS:
            old_key, old = self._rows.popitem(last=False)
            self.bytes -= row_bytes(old) + len(old_key)

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
