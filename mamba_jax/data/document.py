"""What passes between readers and the token cache: parts that give documents, in pieces."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from mamba_jax.data.summary import DataSummary


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document: a large one never is a single string.

    Attributes:
      text: cut where the tokens of the pieces are the tokens of the whole, or where ``is_target``
        changes.
      begins: whether it is the first of its document.
      is_target: whether its tokens are targets under ``data.loss_on="answer"``.
    """

    text: str
    begins: bool
    is_target: bool = True


class CorpusPart(Protocol):
    """What is tokenised and cached as a whole: a file, or some thousand rows of a dataset."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def stat(self) -> tuple[Any, ...] | None:
        """What tells, without reading it, that a file is still what it was: its path, when it was
        changed (ns since 1970), and more; None: nothing does."""
        ...

    @property
    def size_bytes(self) -> int:
        """About as many bytes as it gives text."""
        ...

    @property
    def parallel(self) -> bool:
        """Whether another process can read it."""
        ...

    def key(self) -> str:
        """Returns the hash of the content and of how it is read."""
        ...

    def pieces(self, summary: DataSummary) -> Iterator[Piece]:
        """Reads it; what was skipped goes into the summary."""
        ...
