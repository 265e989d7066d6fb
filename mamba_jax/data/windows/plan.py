"""The plan of a corpus, cached between runs: which stretches of the token cache are trained on and
which are held out. A warm start reads the plan, and neither files nor documents."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba_jax.data.cache.store import Store, write_best_effort
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.windows.hold_out import hold_out
from mamba_jax.data.windows.near_duplicates import first_of_similar
from mamba_jax.data.windows.repetition import Overlap
from mamba_jax.data.windows.split import runs

# Increase it whenever the same documents would be split in another way: earlier runs then no longer
# resume. A split that only some corpora get has ``Division.rule`` in its fingerprint instead.
_FORMAT = 2
# Increase it whenever a cached plan would differ or has other fields.
_KEPT_FORMAT = 3


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """What decides, besides the documents, which text is held out.

    Attributes:
      seed: random seed of the choice.
      fraction: share of the tokens.
      window_tokens: tokens of one window, its last target included.
      deduplicate: "exact" keeps the first of equal documents; "near" also the first of similar
        ones; "none" keeps all.
      document_windows: whether a run is one document, or a part of one.
    """

    seed: int
    fraction: float
    window_tokens: int
    deduplicate: str
    document_windows: bool


@dataclasses.dataclass(frozen=True)
class CorpusPlan:
    """Shapes: r runs, see ``data.windows.split``.

    Attributes:
      shards: names of the shards; the runs are positions in their tokens.
      fingerprint: hash of documents, tokenizer and settings: equal ones give equal windows,
        whatever the layout of the cache.
      origins: the names of the sources.
      train: int64 (r, 2) of each source, runs.
      eval: int64 (r, 2), runs of all.
      by_place: whether there was too little text to split it by content.
      overlap: what the sides share; None if there is too little text for two windows.
      summary: what was read and skipped.
    """

    shards: tuple[str, ...]
    fingerprint: str
    origins: tuple[str, ...]
    train: tuple[np.ndarray, ...]
    eval: np.ndarray
    by_place: bool
    overlap: Overlap | None
    summary: DataSummary


def load_or_make(
    store: Store,
    tokenizer: Tokenizer,
    taken: Sequence[Sequence[tuple[str, str]]],
    settings: SplitSettings,
    found: Sequence[DataSummary],
) -> CorpusPlan | None:
    """Returns the plan of parts that are in the store; None if one of their shards is damaged.

    Args:
      store: the store that holds the parts.
      tokenizer: the store's tokenizer.
      taken: (key, name) of the parts of each source, in order.
      settings: how to split.
      found: for each source, what the search for its files skipped.
    """
    origins = tuple(source.origin for source in found)
    words = [_KEPT_FORMAT, dataclasses.astuple(settings), [list(parts) for parts in taken]]
    key = hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()
    path = store.root / "plans" / f"{key}.npz"
    try:
        with np.load(path) as arrays:
            made = json.loads(arrays["made"].tobytes())
            plan = CorpusPlan(
                tuple(made["shards"]),
                made["fingerprint"],
                origins,
                tuple(arrays[f"train_{number}"] for number in range(len(taken))),
                arrays["eval"],
                made["by_place"],
                Overlap(**made["overlap"]) if made["overlap"] else None,
                _summary(found, made["summary"]),
            )
        if plan.shards and store.has(plan.shards):
            return plan if store.check(plan.shards) else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # there is none yet, or it is damaged: make it
    entries = store.entries([part for parts in taken for part in parts])
    sources = [number for number, parts in enumerate(taken) for _ in parts]
    shards = tuple(dict.fromkeys(name for name, _ in entries))
    if not store.check(shards):
        return None
    documents = store.documents(entries, shards, sources)
    counted = DataSummary("")
    for _, entry in entries:
        counted.add(entry.summary)
    kept = documents if settings.deduplicate == "none" else documents.without_duplicates()
    counted.duplicates = len(documents.end_d) - len(kept.end_d)
    if settings.deduplicate == "near":
        different = len(kept.end_d)
        kept = kept.chosen(first_of_similar(store.tokens(shards), kept))
        counted.near_duplicates = different - len(kept.end_d)
    counted.documents, counted.text_bytes = len(kept.end_d), int(kept.bytes_d.sum())
    counted.tokens = kept.token_count
    train, held_out = (np.zeros((0, 2), np.int64),) * len(taken), np.zeros((0, 2), np.int64)
    by_place, overlap = False, None
    identity = [_FORMAT, tokenizer.identity, kept.identity().hex(), dataclasses.astuple(settings)]
    if counted.tokens >= 2 * settings.window_tokens:
        division = hold_out(
            store.tokens(shards),
            kept,
            tokenizer,
            seed=settings.seed,
            fraction=settings.fraction,
            window_tokens=settings.window_tokens,
        )
        overlap, units, is_eval_u = division.overlap, division.units, division.is_eval_u
        if division.by_place:
            by_place = True
            first, held_out = division.by_place
            train = (first, *train[1:])
        elif is_eval_u is not None:
            across = not settings.document_windows
            side = lambda mine_u: runs(units, mine_u, across_documents=across)
            train = tuple(side(~is_eval_u & (units.source_u == k)) for k in range(len(taken)))
            held_out = side(is_eval_u)
        identity += [division.rule] if division.rule else []
    fingerprint = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    made = {
        "shards": shards,
        "fingerprint": fingerprint,
        "by_place": by_place,
        "overlap": overlap and dataclasses.asdict(overlap),
        "summary": counted.to_json(),
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(made).encode(), np.uint8)
    arrays: dict[str, Any] = {f"train_{number}": mine for number, mine in enumerate(train)}
    arrays |= {"eval": held_out, "made": text}
    np.savez(buffer, **arrays)
    write_best_effort(path, buffer.getvalue())
    summary = _summary(found, made["summary"])
    return CorpusPlan(shards, fingerprint, origins, train, held_out, by_place, overlap, summary)


def _summary(found: Sequence[DataSummary], counted: dict[str, Any]) -> DataSummary:
    summary = DataSummary(" and ".join(source.origin for source in found))
    for source in found:
        summary.add(source)
    summary.add(DataSummary.from_json(counted))
    return summary
