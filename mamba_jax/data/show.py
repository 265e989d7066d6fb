"""Windows as a person reads them: where documents begin, what is learnt, what is padding."""

import itertools
import unicodedata
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mamba_jax.data.tokenizer import Tokenizer

_RESET, _DIM, _MARK = "\033[0m", "\033[2m", "\033[1;35m"
_DOCUMENTS = ("\033[36m", "\033[33m")  # by turns


def show_window(
    window: np.ndarray, tokenizer: Tokenizer, names: Mapping[int, str], *, colour: bool
) -> str:
    """Returns the text of a window with its boundaries.

    With colours documents differ from their neighbours, and what is not learnt is dim; without
    them marks say so.

    Args:
      window: int32 (t,); ``~token`` is one that is no target.
      tokenizer: what made the tokens.
      names: of ids that stand for no text.
      colour: whether the terminal shows colours.
    """
    paint: Callable[[str, str], str] = lambda code, text: (
        f"{code}{text}{_RESET}" if colour and text else text
    )
    shown, document = [], 0
    for kind, learnt, ids in _stretches(window, tokenizer.eot_id, names):
        if kind == "document" and not learnt:
            shown.append(paint(_DIM, f"⟦padding: {len(ids):,} tokens⟧"))
        elif kind == "document":
            document += len(ids)
            shown.append(paint(_MARK, "⟦document⟧" * len(ids)))
        elif kind == "name":
            shown.append(paint(_MARK, "".join(f"⟦{names[token]}⟧" for token in ids)))
        else:
            text = _printable(tokenizer.decode(ids))
            if not learnt and not colour:
                text = f"⟦not learnt:⟧{text}⟦learnt:⟧"
            code = _DOCUMENTS[document % 2] + ("" if learnt else _DIM)
            shown.append(paint(code, text))
    return "".join(shown)


def _stretches(
    window: np.ndarray, eot_id: int, names: Mapping[int, str]
) -> Iterator[tuple[str, bool, list[int]]]:
    """Yields (kind, whether learnt, ids) of neighbours that belong together."""
    kind_of = lambda token: "document" if token == eot_id else "name" if token in names else "text"
    pairs = [(int(token if token >= 0 else ~token), bool(token >= 0)) for token in window]
    for (kind, learnt), group in itertools.groupby(pairs, lambda pair: (kind_of(pair[0]), pair[1])):
        yield kind, learnt, [token for token, _ in group]


def _printable(text: str) -> str:
    """Escapes what would move the cursor or worse."""
    harmless = lambda c: c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf")
    return "".join(
        c if harmless(c) or c == "\u200d" else c.encode("unicode_escape").decode() for c in text
    )
