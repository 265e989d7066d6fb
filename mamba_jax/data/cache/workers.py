"""Tokenises many parts into shards, in several processes."""

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from mamba_jax.data.cache.shards import Builder
from mamba_jax.data.document import CorpusPart
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.tokenizers.load import load_tokenizer

SHARD_BYTES = 64_000_000  # of text: a kill loses at most this much per process
SHARD_PARTS = 4_000


def build_shards(
    root: pathlib.Path,
    tokenizer: Tokenizer,
    waiting: Sequence[tuple[str, CorpusPart]],
    workers: int,
) -> None:
    """Tokenises parts and shows a progress bar.

    Args:
      root: of the shards.
      tokenizer: of all parts.
      waiting: (key, part) of each, in order.
      workers: processes; 0 for one per processor, and fewer for little text.

    Raises:
      OSError: if the folder cannot be written.
      UserError: if a file changed while it was read.
    """
    from tqdm import tqdm

    sizes = [part.size_bytes for _, part in waiting]
    total = sum(sizes)
    groups: list[list[tuple[str, CorpusPart]]] = [[]]
    filled = 0
    for item, size in zip(waiting, sizes, strict=True):
        if groups[-1] and (filled + size > SHARD_BYTES or len(groups[-1]) >= SHARD_PARTS):
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    workers = min(workers or os.cpu_count() or 1, len(groups))
    # disable=None: no bar where standard error is not a terminal.
    bar = tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=None)
    with bar:
        if workers == 1:
            for group in groups:
                _build_shard(root, tokenizer, group, bar.update)
            return
        # Not forked: this process may have threads by now. Each loads the tokenizer itself.
        context = multiprocessing.get_context("spawn")
        name = tokenizer.name
        with concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_begin_worker
        ) as pool:
            jobs = [pool.submit(_build_in_worker, root, name, group) for group in groups]
            try:
                for job in concurrent.futures.as_completed(jobs):
                    bar.update(job.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _build_shard(
    root: pathlib.Path,
    tokenizer: Tokenizer,
    group: Sequence[tuple[str, CorpusPart]],
    progress: Callable[[int], Any],
) -> int:
    with Builder(root, tokenizer) as builder:
        for key, part in group:
            builder.add(part, key, progress)
        builder.seal()
        return builder.text_bytes


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent process, and exits with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _build_in_worker(
    root: pathlib.Path, tokenizer: str, group: list[tuple[str, CorpusPart]]
) -> int:
    return _build_shard(root, load_tokenizer(tokenizer), group, lambda _: None)
