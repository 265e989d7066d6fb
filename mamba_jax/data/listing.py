"""``--list_files``: what of a corpus' files would be read, and what not and why;
``--clear_cache``."""

from collections.abc import Callable

from mamba_jax.config import DataConfig
from mamba_jax.data import store
from mamba_jax.data.pipeline import open_sources
from mamba_jax.data.sources import FilePart, Source
from mamba_jax.data.summary import Summary


def list_files(config: DataConfig, show: Callable[[str], None]) -> None:
    """Reads every file, without tokenising, and shows a line for each and the summary.

    The rows of a dataset are not read.

    Raises:
      UserError: if there is nothing to read.
    """
    for one in config.sources:
        _list_source(open_sources(one, show), show)


def _list_source(source: Source, show: Callable[[str], None]) -> None:
    total = Summary(source.origin)
    total.add(source.found)
    for path in source.files:
        part, summary = FilePart(path), Summary("")
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


def _judgement(summary: Summary) -> str:
    if summary.skipped:
        return f"skipped, {next(iter(summary.skipped))}"
    words = f"{summary.documents:,} documents, {summary.text_bytes:,} bytes of text"
    return "; ".join([words, *summary.repaired])


def clear_cache(config: DataConfig, show: Callable[[str], None]) -> None:
    """Removes all tokens from the cache.

    Raises:
      OSError: if they cannot be removed.
    """
    size_bytes = store.clear(config.cache_root)
    show(
        f"removed {size_bytes / 1e6:,.2f} MB of tokens from {store.cache_folder(config.cache_root)}"
    )
