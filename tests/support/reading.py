"""What a test needs to read files as the store does."""

import pathlib
import tempfile
from collections.abc import Iterable

from mamba_jax.data.cache.store import Store
from mamba_jax.data.document import Piece
from mamba_jax.data.sources.files import open_source
from mamba_jax.data.sources.readers import pieces
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.data.windows.plan import SplitSettings, load_or_make


def documents_of(pieces: Iterable[Piece]) -> list[list[tuple[str, bool]]]:
    """Joins pieces to documents: lists of (text, is_target)."""
    documents: list[list[tuple[str, bool]]] = []
    for piece in pieces:
        assert piece.text
        if piece.begins:
            documents.append([])
        document = documents[-1]
        if document and document[-1][1] == piece.is_target:
            document[-1] = (document[-1][0] + piece.text, piece.is_target)
        else:
            document.append((piece.text, piece.is_target))
    return documents


def texts_of(pieces: Iterable[Piece]) -> list[str]:
    return ["".join(text for text, _ in document) for document in documents_of(pieces)]


def read(path) -> tuple[list[str], DataSummary]:
    """Returns (texts, summary) of one file."""
    summary = DataSummary(str(path))
    return texts_of(pieces(str(path), summary)), summary


def read_folder(path) -> tuple[list[str], DataSummary]:
    """Returns (texts, summary) of a folder or file, as ``data_dir`` would be read: by the cache."""
    source, tokenizer = open_source(str(path), print), load_tokenizer("bytes")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(pathlib.Path(folder), tokenizer, print)
        taken = store.tokenise(source.parts(), workers=1)
        settings = SplitSettings(
            seed=0,
            fraction=0.01,
            window_tokens=1 << 40,
            deduplicate="exact",
            document_windows=False,
        )
        plan = load_or_make(store, tokenizer, [taken], settings, [source.found])
        assert plan is not None
        if not plan.summary.documents:
            raise source.nothing(plan.summary)
        documents = store.documents(store.entries(taken), plan.shards).without_duplicates()
        tokens = store.tokens(plan.shards)
        texts = [
            tokenizer.decode(tokens[start + 1 : end])
            for start, end in zip(documents.start_d, documents.end_d, strict=True)
        ]
    return texts, plan.summary
