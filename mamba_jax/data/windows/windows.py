"""Random access to the windows of tokens in runs of the token cache.

A token that is not a target is written as ``~token``, which is negative, so that one array holds
both tokens and loss mask. The first token of a window is never a target. A separator is a target if
the token before it is one and ends its document: after a prompt without an answer nothing is
trained on, not even stopping.
"""

import abc
import bisect
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mamba_jax.data.cache.store import Flat
from mamba_jax.data.windows.split import stream_tokens


class Windows(Protocol):
    """Windows of ``seq_len + 1`` tokens, int32."""

    stream_tokens: int  # of the runs, separators included

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns window ``index`` as int32 (seq_len + 1,)."""
        ...


class _Cache:
    """The tokens of the cache; one that is not a target is given as ``~token``."""

    def __init__(self, tokens: Flat, loss_mask: Flat | None, eot_id: int):
        self._tokens, self._loss_mask, self._eot_id = tokens, loss_mask, eot_id

    def copy(self, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = self._tokens[start:stop]
        if self._loss_mask is not None:
            loss_mask = self._loss_mask[start:stop] != 0
            for at in np.flatnonzero(out == self._eot_id).tolist():
                loss_mask[at] = start + at > 0 and self._is_target(start + at - 1)
            np.invert(out, out=out, where=~loss_mask)

    def separator(self, end: int) -> int:
        """Returns the separator after a stretch that ends at ``end``, as a window holds it."""
        is_target = self._loss_mask is None or (
            self._ends_document(end) and self._is_target(end - 1)
        )
        return self._eot_id if is_target else ~self._eot_id

    def _is_target(self, position: int) -> bool:
        """Returns whether a token of a text is a target; False for a separator."""
        assert self._loss_mask is not None
        here = slice(position, position + 1)
        return bool(self._loss_mask[here][0]) and int(self._tokens[here][0]) != self._eot_id

    def _ends_document(self, end: int) -> bool:
        return end == len(self._tokens) or int(self._tokens[end : end + 1][0]) == self._eot_id


class _RunWindows(abc.ABC):
    """Windows of runs of the cache."""

    def __init__(
        self,
        tokens: Flat,
        runs: np.ndarray,
        seq_len: int,
        eot_id: int,
        loss_mask: Flat | None = None,
    ):
        """Args:
        tokens: the tokens of the cache.
        runs: int64 (r, 2), see ``split``; the first token of each reads as ``eot_id``.
        seq_len: inputs, and targets, of one window.
        loss_mask: 0 where a token of the cache is not a target; None: all are.
        """
        self.seq_len = seq_len
        self.stream_tokens = stream_tokens(runs)
        self._cache = _Cache(tokens, loss_mask, eot_id)
        self._eot_id = eot_id
        self._use(runs)

    @abc.abstractmethod
    def _use(self, runs: np.ndarray) -> None:
        """Prepares what finds the tokens of a window."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self._window(index)

    @abc.abstractmethod
    def _window(self, index: int) -> np.ndarray: ...


class PackedWindows(_RunWindows):
    """Windows of a stream of documents; adjacent ones share a token, so that each is a target once.

    Window i holds positions ``i * seq_len … (i + 1) * seq_len`` of the stream, both included. The
    rest of the stream that fills no window (fewer than ``seq_len`` tokens) is not used.
    """

    def _use(self, runs: np.ndarray) -> None:
        # Plain integers: ten times faster than numpy's in the loop of `_read`.
        self._runs: list[tuple[int, int]] = [(start, end) for start, end in runs.tolist()]
        self._offsets = [0, *np.cumsum(runs[:, 1] - runs[:, 0]).tolist()]

    def __len__(self) -> int:
        return max(self.stream_tokens - 1, 0) // self.seq_len

    def _window(self, index: int) -> np.ndarray:
        start = index * self.seq_len
        return self._read(start, start + self.seq_len + 1)

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
            self._cache.copy(first, first + count, out[filled : filled + count])
            if skip == 0:  # the first run has no document before it, and its start is not a target
                out[filled] = self._cache.separator(self._runs[run - 1][1]) if run else self._eot_id
            filled += count
            run += 1
        return out


class DocumentWindows(_RunWindows):
    """Windows that hold one document each, ended by a separator and padded with separators that are
    no targets. A document longer than a window takes several; adjacent ones share a token."""

    def _use(self, runs: np.ndarray) -> None:
        self._runs = runs  # each a document or a part of one
        # A run of n tokens, its separator included, has n targets: the last is the next separator.
        windows_r = -(-(runs[:, 1] - runs[:, 0]) // self.seq_len)
        self._firsts = np.concatenate([[0], np.cumsum(windows_r)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _window(self, index: int) -> np.ndarray:
        run = int(np.searchsorted(self._firsts, index, side="right")) - 1
        start, end = (int(edge) for edge in self._runs[run])
        first = start + (index - int(self._firsts[run])) * self.seq_len
        out = np.full(self.seq_len + 1, ~np.int32(self._eot_id), np.int32)
        count = min(end - first, len(out))
        self._cache.copy(first, first + count, out[:count])
        if first == start:
            out[0] = self._eot_id
        if count < len(out):
            out[count] = self._cache.separator(end)
        return out


class Joined:
    """The windows of several sources, one after another."""

    def __init__(self, sources: Sequence[Windows]):
        self.sources = tuple(sources)
        self.stream_tokens = sum(source.stream_tokens for source in sources)
        self._firsts = [0, *np.cumsum([len(source) for source in sources]).tolist()]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        source = bisect.bisect_right(self._firsts, index) - 1
        return self.sources[source][index - self._firsts[source]]
