"""What a test needs to read files as the store does."""

from collections.abc import Iterable

from mamba_jax.data.document import Piece
from mamba_jax.data.readers import pieces
from mamba_jax.data.sources import open_source
from mamba_jax.data.summary import Summary


def documents_of(pieces: Iterable[Piece]) -> list[list[tuple[str, bool]]]:
    """Joins pieces to documents: lists of (text, learn)."""
    documents: list[list[tuple[str, bool]]] = []
    for piece in pieces:
        assert piece.text
        if piece.begins:
            documents.append([])
        document = documents[-1]
        if document and document[-1][1] == piece.learn:
            document[-1] = (document[-1][0] + piece.text, piece.learn)
        else:
            document.append((piece.text, piece.learn))
    return documents


def texts_of(pieces: Iterable[Piece]) -> list[str]:
    return ["".join(text for text, _ in document) for document in documents_of(pieces)]


def read(path) -> tuple[list[str], Summary]:
    """Returns (texts, summary) of one file."""
    summary = Summary(str(path))
    return texts_of(pieces(str(path), summary)), summary


def read_folder(path) -> tuple[list[str], Summary]:
    """Returns (texts, summary) of a folder or file, as ``data_dir`` would be read."""
    source = open_source(str(path), print)
    digests, summary = source.read()
    documents = list(source.documents())
    assert [digest for digest, _ in documents] == digests  # both readings agree
    return [text for _, text in documents], summary
