"""Windows as text for people: where documents begin, what is trained on, what is padding."""

import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mamba_jax.data.tokenizers.base import Tokenizer

_RESET, _DIM, _MARK = "\033[0m", "\033[2m", "\033[1;35m"
_DOCUMENTS = ("\033[36m", "\033[33m")  # alternating


def show_window(
    window: np.ndarray, tokenizer: Tokenizer, names: Mapping[int, str], *, colour: bool
) -> str:
    """Returns the text of a window with its boundaries.

    With colours, adjacent documents differ in colour and text that is not trained on is dim;
    without them, marks show both.

    Args:
      window: int32 (t,); ``~token`` is one that is not a target.
      tokenizer: the tokenizer that made the tokens.
      names: names of the ids that have no text.
      colour: whether the terminal shows colours.
    """
    paint: Callable[[str, str], str] = lambda code, text: (
        f"{code}{text}{_RESET}" if colour and text else text
    )
    shown, document = [], 0
    text_end = len(window) - padding(window, tokenizer.eot_id)
    for kind, is_target, ids in _stretches(window[:text_end], tokenizer.eot_id, names):
        if kind == "document":
            document += len(ids)
            style, text = _MARK, "⟦document⟧" * len(ids)
        elif kind == "name":
            style, text = _MARK, "".join(f"⟦{names[token]}⟧" for token in ids)
        else:
            style, text = _DOCUMENTS[document % 2], _printable(tokenizer.decode(ids))
        if not is_target and not colour:
            text = f"⟦not trained on:⟧{text}⟦trained on:⟧"
        shown.append(paint(style + ("" if is_target else _DIM), text))
    if text_end < len(window):
        shown.append(paint(_DIM, f"⟦padding: {len(window) - text_end:,} tokens⟧"))
    return "".join(shown).replace("⟦trained on:⟧⟦not trained on:⟧", "")


def padding(window: np.ndarray, eot_id: int) -> int:
    """Returns how many tokens at a window's end are padding.

    Padding consists of separators that are not targets; one directly after a text ends its
    document.
    """
    others = np.flatnonzero(window != ~eot_id)
    start = int(others[-1]) + 1 if len(others) else 0
    ends_document = start > 0 and window[start - 1] not in (eot_id, ~eot_id)
    return max(len(window) - start - ends_document, 0)


def count_separators(window: np.ndarray, eot_id: int) -> int:
    """Returns how many separators a window has outside its padding."""
    text = window[: len(window) - padding(window, eot_id)]
    return int(np.isin(text, (eot_id, ~eot_id)).sum())


def _stretches(
    window: np.ndarray, eot_id: int, names: Mapping[int, str]
) -> Iterator[tuple[str, bool, list[int]]]:
    """Yields (kind, is_target, ids) of each stretch of equal kind and mask."""
    kind_of = lambda token: "document" if token == eot_id else "name" if token in names else "text"
    pairs = [(int(token if token >= 0 else ~token), bool(token >= 0)) for token in window]
    for (kind, is_target), group in itertools.groupby(
        pairs, lambda pair: (kind_of(pair[0]), pair[1])
    ):
        yield kind, is_target, [token for token, _ in group]


def _printable(text: str) -> str:
    """Escapes control characters, which could move the cursor or worse."""
    harmless = lambda c: c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf")
    return "".join(
        c if harmless(c) or c == "\u200d" else c.encode("unicode_escape").decode() for c in text
    )
