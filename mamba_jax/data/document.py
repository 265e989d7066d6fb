"""The interface between readers and the token cache: parts that yield documents in pieces."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from mamba_jax.data.summary import DataSummary


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document, so that a large document is never a single string.

    Attributes:
      text: cut where the tokens of the pieces are the tokens of the whole, or where ``is_target``
        changes.
      begins: whether it is the first piece of its document.
      is_target: whether its tokens are targets under ``data.loss_on="answer"``.
    """

    text: str
    begins: bool
    is_target: bool = True


class CorpusPart(Protocol):
    """The unit of tokenising and caching: a file, or some thousand rows of a dataset."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def stat(self) -> tuple[Any, ...] | None:
        """What identifies an unchanged file without reading it: its path, the time of its last
        change (ns since 1970), and more; None if nothing does."""
        ...

    @property
    def size_bytes(self) -> int:
        """The approximate size of its text."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether another process can read it."""
        ...

    def key(self) -> str:
        """Returns the hash of the content and of how it is read."""
        ...

    def pieces(self, summary: DataSummary) -> Iterator[Piece]:
        """Yields its documents; what was skipped is counted in the summary."""
        ...
