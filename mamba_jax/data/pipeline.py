"""Entry point to the data: ``prepare`` finds, tokenises and splits text; ``Corpus`` gives batches.

Reading a batch takes about a millisecond while the device computes the previous step (steps are
dispatched asynchronously), so no loader thread is needed that could hang or run ahead of a resume.
"""

import concurrent.futures.process
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator

import numpy as np

from mamba_jax.config import DataConfig
from mamba_jax.data.cache.store import Store, cache_folder
from mamba_jax.data.sources.files import TextSource, open_source
from mamba_jax.data.sources.hub import open_dataset
from mamba_jax.data.sources.task_rows import open_tasks
from mamba_jax.data.summary import DataSummary, shown
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.data.windows.fill_in_the_middle import FillInTheMiddle
from mamba_jax.data.windows.order import SampleOrder
from mamba_jax.data.windows.plan import CorpusPlan, SplitSettings, load_or_make
from mamba_jax.data.windows.repetition import Overlap
from mamba_jax.data.windows.windows import DocumentWindows, Joined, PackedWindows, Windows
from mamba_jax.errors import UserError

_COUNTED_TOKENS = 1 << 24  # of a side, for the distribution of its tokens
_COUNTED_AT_ONCE = 256  # windows
_REPETITIVE = 0.8  # share of tokens left when repetition is counted once: reported below this
# Shares of held-out text that also occurs in training: reported, and a warning, from these on. Code
# of many authors has about a tenth: licences, imports, tables.
_REPORTED_OVERLAP, _WARNED_OVERLAP = 0.001, 0.1


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text made ready for training. Shapes: b batch, t = seq_len + 1 tokens of a window.

    Attributes:
      tokenizer: the tokenizer that made the tokens.
      fingerprint: hash of tokens, split, windows and weights; equal ones give equal batches.
      train: training windows of all sources.
      eval: held-out windows; no document or block of one is on both sides.
      summary: what was read and what was skipped.
      origins: names of the sources.
      phases: (step, weight of each source), the first at step 0: the weights from that step on.
      fill: reorders some documents of training windows for fill-in-the-middle; None: disabled.
    """

    tokenizer: Tokenizer
    fingerprint: str
    train: Joined
    eval: Windows
    summary: DataSummary
    origins: tuple[str, ...]
    phases: tuple[tuple[int, tuple[float, ...]], ...]
    fill: FillInTheMiddle | None = None

    def train_batches(
        self, batch_size: int, seed: int, start_sample: int = 0
    ) -> Iterator[np.ndarray]:
        """Yields batches of shuffled training windows, int32 (b, t), endlessly.

        The window at sample i depends on (fingerprint, seed, i) alone: not on the batch size
        (except where a phase of a curriculum begins, which is a step), nor on where the iteration
        began. Each epoch has its own order. The state to resume from is therefore one integer, the
        number of samples seen.

        Args:
          batch_size: windows per batch.
          seed: random seed of the order, 0 or more.
          start_sample: index of the first window to yield.

        Raises:
          ValueError: on a batch_size below 1 or a negative start_sample.
        """
        if batch_size < 1 or start_sample < 0:
            raise ValueError(f"cannot batch by {batch_size} from sample {start_sample}")
        return self._batches(self._order(batch_size, seed), batch_size, seed, start_sample)

    def _order(self, batch_size: int, seed: int) -> SampleOrder:
        phases = [(step * batch_size, weights) for step, weights in self.phases]
        return SampleOrder([len(source) for source in self.train.sources], phases, seed)

    def _batches(
        self, order: SampleOrder, batch_size: int, seed: int, start: int
    ) -> Iterator[np.ndarray]:
        def window_at(sample: int) -> np.ndarray:
            source, index = order[sample]
            window = self.train.sources[source][index]
            return self.fill(window, seed, sample) if self.fill else window

        while True:
            yield np.stack([window_at(sample) for sample in range(start, start + batch_size)])
            start += batch_size

    def shares_text(self, samples: int, batch_size: int) -> str:
        """Returns a line about the sources of a run's first samples; "" with one source."""
        if len(self.origins) == 1 or not samples:
            return ""
        counts = self._order(batch_size, 0).counts(samples)
        sources = zip(self.origins, counts, self.train.sources, strict=True)
        return "; ".join(
            f"{origin}: {count:,} windows, {count / samples:.2%}, {count / len(windows):.2f} epochs"
            for origin, count, windows in sources
            if len(windows)
        )

    def eval_batches(
        self, batch_size: int, max_windows: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields held-out windows int32 (b, t) with weights float32 (b,), the same every time.

        Args:
          batch_size: windows per batch; the last batch is padded with windows of weight 0.
          max_windows: how many windows, evenly spread over the set; 0 for all.
        """
        count = min(max_windows or len(self.eval), len(self.eval))
        chosen = [i * len(self.eval) // count for i in range(count)]
        for start in range(0, count, batch_size):
            indices = chosen[start : start + batch_size]
            missing = batch_size - len(indices)
            windows_bt = np.stack([self.eval[i] for i in indices + indices[-1:] * missing])
            yield windows_bt, np.array([1.0] * len(indices) + [0.0] * missing, np.float32)

    @functools.cached_property
    def unigram_nll(self) -> float:
        """Nats per held-out target under the add-one unigram distribution of the train targets.

        A model that knows only the frequencies of tokens reaches this loss. Where a side has more
        than about ten million tokens, evenly spread windows with that many are counted, so that
        starting stays fast.
        """
        train_v, eval_v = self._counts(self.train), self._counts(self.eval)
        log_p_v = np.log(train_v + 1) - np.log(train_v.sum() + len(train_v))
        return float(-(eval_v * log_p_v).sum() / eval_v.sum())

    def _counts(self, side: Windows) -> np.ndarray:
        """Returns int64 (v,), how often each id is a target."""
        counts_v = np.zeros(self.tokenizer.vocab_size, np.int64)
        count = min(len(side), max(_COUNTED_TOKENS // len(self.eval[0]), 1))
        for first in range(0, count, _COUNTED_AT_ONCE):
            numbers = range(first, min(first + _COUNTED_AT_ONCE, count))
            targets = np.concatenate([side[i * len(side) // count][1:] for i in numbers])
            counts_v += np.bincount(targets[targets >= 0], minlength=len(counts_v))
        return counts_v


def prepare(config: DataConfig, *, seq_len: int, seed: int, log: Callable[[str], None]) -> Corpus:
    """Makes a corpus of the text that ``config`` names; fast if its tokens are cached.

    Args:
      config: where the text is, the tokenizer, the share to hold out, the cache.
      seq_len: input tokens of a window.
      seed: chooses what is held out.
      log: called with lines for the user, e.g. ``print``.

    Raises:
      UserError: if there is no text or too little of it, or the cache cannot be used.
    """
    tokenizer, store, plan = tokenise(config, seq_len=seq_len, seed=seed, log=log)
    summary, window_tokens = plan.summary, seq_len + 1
    total = summary.tokens
    if total < 2 * window_tokens:
        raise UserError(
            f"{summary.origin} holds {total} tokens; need ≥ {2 * window_tokens} for "
            f"seq_len {seq_len} (one window to train on, one held out): add text to data.data_dir "
            "or lower model.max_seq_len"
        )
    assert plan.overlap is not None
    if not len(plan.eval):
        raise UserError(_repeats_itself(summary.origin, total, plan.overlap, seq_len))
    if plan.by_place:
        log("too little text to hold out whole documents or blocks: holding out the last window")
    tokens = store.tokens(plan.shards)
    loss_mask = store.loss_mask(plan.shards) if config.loss_on == "answer" else None
    if config.loss_on == "answer" and loss_mask is None:
        raise UserError(
            f'data.loss_on="answer", but nothing in {summary.origin} has a prompt (columns such as '
            'prompt, completion or messages); data.loss_on="all" trains on every token'
        )
    kind = DocumentWindows if config.window == "document" else PackedWindows
    windows_of = lambda side: kind(tokens, side, seq_len, tokenizer.eot_id, loss_mask)
    train, evaluation = Joined([windows_of(side) for side in plan.train]), windows_of(plan.eval)
    has_targets = lambda side: any(np.any(side[i][1:] >= 0) for i in range(len(side)))
    if loss_mask is not None and len(train) and not has_targets(train):
        raise UserError(
            f'data.loss_on="answer", but no training record of {summary.origin} has an answer'
            f'{summary.why()}; data.loss_on="all" trains on every token'
        )
    if loss_mask is not None and not has_targets(evaluation):
        raise UserError(
            "no held-out window has an answer: raise data.eval_fraction or model.max_seq_len"
        )
    whole = ((0, tuple(source.weight for source in config.mixture) or (1.0,)),)
    phases = tuple((phase.step, phase.weights) for phase in config.curriculum) or whole
    for number, (origin, source) in enumerate(zip(plan.origins, train.sources, strict=True)):
        if not len(source) and any(weights[number] for _, weights in phases):
            raise UserError(
                f"{origin} has no window of {seq_len} tokens to train on; remove it from "
                "data.mixture, add text to it, or lower model.max_seq_len"
            )
    words = [plan.fingerprint, config.window, config.loss_on, config.fim_rate, phases]
    fingerprint = hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()
    held, different = evaluation.stream_tokens, plan.overlap.different_tokens
    share = f"{held / total:.2%}"
    if different < _REPETITIVE * total:
        share += f", {plan.overlap.held_out_tokens / different:.2%} with repetition counted once"
    log(
        f"held out {held:,} tokens ({share}): {len(evaluation):,} windows of {seq_len:,}; to train "
        f"on: {len(train):,}"
    )
    if plan.overlap.share >= _REPORTED_OVERLAP:
        log(_shared_text(plan.overlap))
    fill = FillInTheMiddle(config.fim_rate, tokenizer.eot_id, tokenizer.fim_ids)
    return Corpus(
        *(tokenizer, fingerprint, train, evaluation, summary, plan.origins, phases),
        fill=fill if config.fim_rate else None,
    )


def _shared_text(overlap: Overlap) -> str:
    """Returns the line about held-out text that also occurs in training."""
    line = (
        f"{overlap.share:.1%} of the held-out text also occurs in the training text, in stretches "
        f"of {overlap.span_tokens} tokens or more"
    )
    if overlap.share < _WARNED_OVERLAP:
        return line
    return (
        f"warning: {line}, so the held-out loss measures memorisation in part; "
        'data.deduplicate="near" leaves out similar documents'
    )


def _repeats_itself(origin: str, total: int, overlap: Overlap, seq_len: int) -> str:
    """Returns the error message for text from which nothing can be held out."""
    different, needed = round(overlap.different_tokens), 2 * (seq_len + 1)
    left = (
        f"{origin} repeats itself: about {different:,} of its {total:,} tokens are left when "
        "repetition is counted once"
    )
    if different < needed:
        return (
            f"{left}; need ≥ {needed:,} for seq_len {seq_len} (one window to train on, one held "
            "out): add other text to data.data_dir or lower model.max_seq_len"
        )
    return f"{left}, and any held-out text also occurs in training: add other text to data.data_dir"


def tokenise(
    config: DataConfig, *, seq_len: int, seed: int, log: Callable[[str], None]
) -> tuple[Tokenizer, Store, CorpusPlan]:
    """Does the slow part of ``prepare``; the corpus may be too small for a window.

    Raises:
      UserError: if there is no text, or the cache cannot be used.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    sources = [open_sources(one, log) for one in config.sources]
    settings = SplitSettings(
        seed=seed,
        fraction=config.eval_fraction,
        window_tokens=seq_len + 1,
        deduplicate=config.deduplicate,
        document_windows=config.window == "document",
    )
    try:
        for _ in range(3):  # another run can remove a damaged shard between two attempts
            store = Store(config.cache_root, tokenizer, log)
            taken = [store.tokenise(one.parts(), config.tokenise_workers) for one in sources]
            found = [one.found for one in sources]
            if plan := load_or_make(store, tokenizer, taken, settings, found):
                break
        else:
            raise OSError(None, "a file written there could not be read back")
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a tokenising process was killed, possibly out of memory; set "
            "data.tokenise_workers=1, which needs the least memory"
        ) from error
    except OSError as error:
        root = shown(str(cache_folder(config.cache_root)))
        raise UserError(
            f"cannot use the token cache {root}: {error.strerror}; set data.cache_dir "
            "to a writable folder with enough space"
        ) from error
    summary = plan.summary
    if not summary.documents:
        raise sources[0].nothing(summary)
    if summary.tokens == summary.documents:  # separators alone
        raise UserError(
            f'data.tokenizer="{config.tokenizer}" produces no tokens for the text of '
            f"{summary.origin}; use another tokenizer"
        )
    for line in summary.lines():
        log(line)
    for line in filter(None, (tokenizer.remark, tokenizer.roundtrip_warning)):
        log(line)
    return tokenizer, store, plan


def open_sources(config: DataConfig, log: Callable[[str], None]) -> TextSource:
    """Finds the files, dataset and tasks that ``config`` names.

    Raises:
      UserError: if there is none.
    """
    if not config.dataset and not config.tasks:
        return open_source(config.data_dir, log)
    if not config.data_dir and os.path.exists("data"):
        what = "a dataset" if config.dataset else "tasks"
        log(f"./data is ignored because {what} was given; --data_dir data adds it")
    files = open_source(config.data_dir, log) if config.data_dir else None
    rows = (
        open_dataset(config, log)
        if config.dataset
        else open_tasks(config.tasks, config.task_examples)
    )
    return (
        files.with_rows(rows)
        if files
        else TextSource(rows.origin, (), DataSummary(rows.origin), rows)
    )
