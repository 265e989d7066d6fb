"""Random access to the windows of a token stream that lies in runs of the token cache."""

import bisect
from collections.abc import Iterator

import numpy as np

from mamba_jax.data.split import stream_tokens
from mamba_jax.data.store import Flat

_CHUNK_TOKENS = 1 << 22


class Windows:
    """Windows of ``seq_len + 1`` tokens; neighbours share one, so that each is a target once.

    Window i holds positions ``i * seq_len … (i + 1) * seq_len`` of the stream, both included. The
    rest of the stream that fills no window (fewer than ``seq_len`` tokens) is not used.
    """

    def __init__(self, tokens: Flat, runs: np.ndarray, seq_len: int, eot_id: int):
        """Args:
        tokens: of the cache.
        runs: int64 (r, 2), see ``split``; the first token of each reads as ``eot_id``.
        seq_len: inputs, and targets, of one window.
        """
        self.seq_len = seq_len
        self.stream_tokens = stream_tokens(runs)
        self._tokens = tokens
        self._eot_id = eot_id
        # Plain integers: ten times faster than numpy's in the loop of `_read`.
        self._runs: list[tuple[int, int]] = [(start, end) for start, end in runs.tolist()]
        self._offsets = [0, *np.cumsum(runs[:, 1] - runs[:, 0]).tolist()]

    def __len__(self) -> int:
        return max(self.stream_tokens - 1, 0) // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns window ``index`` as int32 (seq_len + 1,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        return self._read(start, start + self.seq_len + 1)

    def targets(self) -> Iterator[np.ndarray]:
        """Yields the targets of all windows in order, int32, some millions at a time."""
        stop = len(self) * self.seq_len + 1
        for start in range(1, stop, _CHUNK_TOKENS):
            yield self._read(start, min(start + _CHUNK_TOKENS, stop))

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Returns positions [start, stop) of the stream."""
        out = np.empty(stop - start, np.int32)
        run = bisect.bisect_right(self._offsets, start) - 1
        filled = 0
        while filled < len(out):
            run_start, run_end = self._runs[run]
            skip = start + filled - self._offsets[run]
            count = min(run_end - run_start - skip, len(out) - filled)
            first = run_start + skip
            out[filled : filled + count] = self._tokens[first : first + count]
            if skip == 0:
                out[filled] = self._eot_id
            filled += count
            run += 1
        return out
