"""``--list_files``: which files of a corpus are read or skipped, and why; ``--clear_cache``."""

from collections.abc import Callable

from mamba_jax.config import DataConfig
from mamba_jax.data.cache import store
from mamba_jax.data.pipeline import open_sources
from mamba_jax.data.sources.files import FilePart, TextSource
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.load import load_tokenizer


def list_files(config: DataConfig, show: Callable[[str], None]) -> None:
    """Reads every file, without tokenising, and shows a line for each and the summary.

    The rows of a dataset are not read. Tokens and duplicates are shown for the files that are in
    the token cache.

    Raises:
      UserError: if there is nothing to read, or no such tokenizer.
    """
    for one in config.sources:
        source = open_sources(one, show)
        _list_source(source, show)
        if source.files:
            tokens = store.Store(config.cache_root, load_tokenizer(config.tokenizer), show)
            show(_cached_line(tokens, source))


def _cached_line(tokens: store.Store, source: TextSource) -> str:
    count, documents = tokens.cached(map(FilePart, source.files))
    if documents is None:
        return (
            "none of these files is in the token cache: tokens and duplicates are known only "
            "after tokenising (mamba_jax.prepare_data)"
        )
    different = len(documents.without_duplicates().end_d)
    return (
        f"the token cache has {count:,} of {len(source.files):,} files: "
        f"{documents.token_count:,} tokens, {len(documents.end_d) - different:,} exact duplicates "
        "among them"
    )


def _list_source(source: TextSource, show: Callable[[str], None]) -> None:
    total = DataSummary(source.origin)
    total.add(source.found)
    for path in source.files:
        part, summary = FilePart(path), DataSummary("")
        for piece in part.pieces(summary):
            summary.documents += piece.begins
            summary.text_bytes += len(piece.text.encode("utf-8", "surrogatepass"))
        show(f"{part.name}: {_judgement(summary)}")
        total.add(summary)
    if source.rows:
        show(f"{source.rows.origin}: not read")
    elif not total.documents:
        raise source.nothing(total)
    for line in total.lines():
        show(line)


def _judgement(summary: DataSummary) -> str:
    if summary.skipped:
        return f"skipped, {next(iter(summary.skipped))}"
    words = f"{summary.documents:,} documents, {summary.text_bytes:,} bytes of text"
    return "; ".join([words, *summary.lost, *summary.repaired])


def clear_cache(config: DataConfig, show: Callable[[str], None]) -> None:
    """Removes all tokens from the cache.

    Raises:
      OSError: if they cannot be removed.
    """
    size_bytes = store.clear(config.cache_root)
    show(
        f"removed {size_bytes / 1e6:,.2f} MB of tokens from {store.cache_folder(config.cache_root)}"
    )
