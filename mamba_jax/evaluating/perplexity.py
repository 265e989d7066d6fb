"""Perplexity and bits per byte of documents, with confidence intervals.

    perplexity = exp(Σ nll / tokens)        bits per byte = Σ nll / (ln 2 · UTF-8 bytes)

Both sums run over the text's own tokens. Each document is preceded by the separator, as in
training; it is not scored, and neither is the separator after the document. A token is predicted
from its whole document so far, however long (``evaluating.scorer``).
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mamba_jax.config import DataConfig
from mamba_jax.data.document import CorpusPart
from mamba_jax.data.sources.files import open_source
from mamba_jax.data.sources.hub import open_dataset
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.text_cuts import well_formed
from mamba_jax.errors import UserError
from mamba_jax.evaluating.scorer import Scorer

_RESAMPLES = 1000
_CONFIDENCE = 0.95
_GROUP = 32  # batches whose documents are sorted by length, so that little is padding


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums over each document: float64 or int64 (documents,)."""

    nlls: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray


def documents(data: str, split: str, log: Callable[[str], None]) -> Iterator[str]:
    """Yields the texts of a file, a folder, or a dataset of the Hugging Face Hub.

    Raises:
      UserError: if there is none.
    """
    if os.path.exists(os.path.expanduser(data)):
        source = open_source(data, log)
    else:
        source = open_dataset(DataConfig(dataset=data, dataset_split=split), log)
    summary = DataSummary(source.origin)
    n_documents = 0
    for text in _texts(source.parts(), summary):
        n_documents += 1
        yield text
    if not n_documents:
        raise UserError(
            f"no text in {source.origin}{summary.why()}; give files with text to --data"
        )


def _texts(parts: Iterable[CorpusPart], summary: DataSummary) -> Iterator[str]:
    for part in parts:
        text: list[str] = []
        for piece in part.pieces(summary):
            if piece.begins and text:
                yield "".join(text)
                text = []
            text.append(piece.text)
        if text:
            yield "".join(text)


def measure(scorer: Scorer, texts: Iterable[str], batch_size: int) -> Measured:
    """Scores each text as a document of its own."""
    begin = np.array([scorer.tokenizer.eot_id], np.int32)
    sums = []
    texts = iter(texts)
    while group := list(itertools.islice(texts, _GROUP * batch_size)):
        sequences = [np.concatenate([begin, scorer.tokenizer.encode(text)]) for text in group]
        for text, scores in zip(group, scorer.scores(sequences), strict=True):
            n_bytes = len(well_formed(text).encode())
            sums.append((scores.nlls.sum(), len(scores.nlls), n_bytes))
    nlls, tokens, text_bytes = (np.array(column) for column in zip(*sums, strict=True))
    return Measured(nlls, tokens, text_bytes)


def summarise(measured: Measured, seed: int) -> dict[str, dict[str, float | None]]:
    """Returns perplexity and bits per byte, each with the ends of its 95% interval.

    The interval is a percentile bootstrap over documents: the range for other documents like these.
    None for a single document, from which it cannot be estimated.
    """
    metrics = {"perplexity": perplexity, "bits_per_byte": bits_per_byte}
    n_documents = len(measured.nlls)
    rng = np.random.default_rng(seed)
    resampled: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(_RESAMPLES if n_documents > 1 else 0):
        times = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents))
        sums = [float(times @ each) for each in dataclasses.astuple(measured)]
        for name, metric in metrics.items():
            resampled[name].append(metric(*sums))
    totals = [float(each.sum()) for each in dataclasses.astuple(measured)]
    result: dict[str, dict[str, float | None]] = {}
    for name, metric in metrics.items():
        ends: list[float | None] = [None, None]
        if n_documents > 1:
            tail = (1 - _CONFIDENCE) / 2
            ends = [float(end) for end in np.quantile(resampled[name], [tail, 1 - tail])]
        result[name] = {"value": metric(*totals), "low": ends[0], "high": ends[1]}
    return result


def perplexity(nll: float, tokens: float, text_bytes: float) -> float:
    """exp of the mean nll of a token; infinite where that overflows."""
    mean = nll / tokens
    return math.exp(mean) if mean < 700 else math.inf


def bits_per_byte(nll: float, tokens: float, text_bytes: float) -> float:
    """Bits that the model needs per byte of the text."""
    return nll / (math.log(2) * text_bytes)
