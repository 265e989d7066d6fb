"""What passes between readers and the store: documents, in pieces."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a document: a large one never is a single string.

    Attributes:
      text: cut where the tokens of the pieces are the tokens of the whole, or where ``learn``
        changes.
      begins: whether it is the first of its document.
      learn: whether its tokens are targets under ``data.loss_on="answer"``.
    """

    text: str
    begins: bool
    learn: bool = True
