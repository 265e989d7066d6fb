"""What a corpus is made of, kept from run to run: which stretches of the cache are trained on and
which are held out. A warm start opens this and reads neither files nor documents."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba_jax.data.near_duplicates import first_of_similar
from mamba_jax.data.split import cut_into_units, split_by_place, split_units
from mamba_jax.data.store import Store, keep
from mamba_jax.data.summary import Summary
from mamba_jax.data.tokenizer import Tokenizer

# Raise it whenever the same documents would be split in another way.
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides, besides the documents, what is held out.

    Attributes:
      seed: of the choice.
      fraction: of the tokens.
      window_tokens: of one window, its last target included.
      deduplicate: "exact": equal documents are left out but for the first; "near": similar ones
        as well; "none".
    """

    seed: int
    fraction: float
    window_tokens: int
    deduplicate: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes: r runs, see ``data.split``.

    Attributes:
      shards: names of those whose tokens the runs are positions in.
      fingerprint: hash of documents, tokenizer and settings: equal ones give equal windows, however
        the cache is laid out.
      train, eval: int64 (r, 2), runs.
      by_place: whether the text was too little to be split by content.
      summary: of what was read.
    """

    shards: tuple[str, ...]
    fingerprint: str
    train: np.ndarray
    eval: np.ndarray
    by_place: bool
    summary: Summary


def load_or_make(
    store: Store,
    tokenizer: Tokenizer,
    taken: Sequence[tuple[str, str]],
    settings: Settings,
    found: Summary,
) -> Plan | None:
    """Returns the plan of parts that the store has; None if a shard of them is damaged.

    Args:
      store: has the parts.
      tokenizer: that the store is of.
      taken: (key, name) of each part, in order.
      settings: how to split.
      found: what the search for them skipped.
    """
    words = [_FORMAT, dataclasses.astuple(settings), list(taken)]
    key = hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()
    path = store.root / "plans" / f"{key}.npz"
    try:
        with np.load(path) as arrays:
            made = json.loads(arrays["made"].tobytes())
            plan = Plan(
                tuple(made["shards"]),
                made["fingerprint"],
                arrays["train"],
                arrays["eval"],
                made["by_place"],
                _summary(found, made["summary"]),
            )
        if plan.shards and store.has(plan.shards):
            return plan if store.check(plan.shards) else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # there is none yet, or it is damaged: it is made anew
    entries = store.entries(taken)
    shards = tuple(dict.fromkeys(name for name, _ in entries))
    if not store.check(shards):
        return None
    documents = store.documents(entries, shards)
    counted = Summary("")
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
    runs, by_place = None, False
    empty = np.zeros((0, 2), np.int64)
    if counted.tokens >= 2 * settings.window_tokens:
        units = cut_into_units(store.tokens(shards), kept, tokenizer)
        runs = split_units(
            units,
            seed=settings.seed,
            fraction=settings.fraction,
            window_tokens=settings.window_tokens,
        )
        by_place = runs is None
        runs = runs or split_by_place(units, settings.window_tokens)
    identity = [_FORMAT, tokenizer.identity, kept.identity().hex(), dataclasses.astuple(settings)]
    fingerprint = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    made = {
        "shards": shards,
        "fingerprint": fingerprint,
        "by_place": by_place,
        "summary": counted.to_json(),
    }
    train, held_out = runs or (empty, empty)
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(made).encode(), np.uint8)
    arrays: dict[str, Any] = {"train": train, "eval": held_out, "made": text}
    np.savez(buffer, **arrays)
    keep(path, buffer.getvalue())
    return Plan(shards, fingerprint, train, held_out, by_place, _summary(found, made["summary"]))


def _summary(found: Summary, counted: dict[str, Any]) -> Summary:
    summary = Summary(found.origin)
    summary.add(found)
    summary.add(Summary.from_json(counted))
    return summary
