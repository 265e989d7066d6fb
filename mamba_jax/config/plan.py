"""A layer plan: which kind each layer is of, as a short text such as ``(M,M,H,M,M)*4``.

An item is a kind (``M``, ``A`` or ``H``) or a group in brackets, each with an optional ``*n``;
commas separate items, and white space means nothing. ``*n`` repeats the item, each time with
weights of its own.

A plan is also run: ``schedule`` finds its repetition, so that a program holds one body per run of
equal layers of the repeated part, whatever the depth.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from mamba_jax.errors import UserError

KINDS = {
    "M": "Mamba layer",
    "A": "Mamba layer with an attention read",
    "H": "hybrid layer",
}
MOST_LAYERS = 1_000
_TOKEN = re.compile(r"\*\s*(?P<number>[0-9]*)|\S")


class LayerRun(NamedTuple):
    """Consecutive layers of one kind."""

    kind: str
    length: int


class Loop(NamedTuple):
    """Runs that repeat as a whole."""

    body: tuple[LayerRun, ...]
    times: int


@functools.lru_cache(maxsize=256)
def parse(text: str) -> tuple[str, ...]:
    """Returns the kind of each layer.

    Raises:
      UserError: on a fault, with its position, counted from 1.
    """

    def fault(place: int, words: str) -> UserError:
        shown = re.sub(r"\s", " ", text if len(text) <= 60 else f"{text[:57]}...")
        return UserError(f'model.plan="{shown}", position {place + 1}: {words}')

    groups: list[tuple[list[str], int]] = [([], 0)]  # innermost last: layers, place of its bracket
    item: list[str] | None = None  # the last item, until what follows it
    repeated = False
    for match in _TOKEN.finditer(text):
        place, sign, number = match.start(), match[0][0], match["number"]
        if sign in KINDS or sign == "(":
            if item is not None:
                raise fault(place, f'a comma is missing before "{sign}"; separate items by commas')
            if sign == "(":
                groups.append(([], place))
            else:
                item, repeated = [sign], False
        elif sign in ",)*" and item is None:
            raise fault(place, f'no layer before "{sign}"; name one, or remove the "{sign}"')
        elif sign in ",)":
            groups[-1][0].extend(item or ())
            item = None
            if sign == ")":
                if len(groups) == 1:
                    raise fault(place, 'the bracket ")" was never opened; remove it')
                item, repeated = groups.pop()[0], False
        elif sign == "*":
            if repeated or not number or not int(number[:9]):
                raise fault(place, '"*" needs one whole number of at least 1, as in M*4')
            # The first nine digits of a longer number are too many layers already.
            item, repeated = (item or []) * min(int(number[:9]), MOST_LAYERS + 1), True
        elif sign == "@":
            raise fault(
                place,
                "loops with shared weights (@) are not supported; repeat with *n, whose layers "
                "have weights of their own",
            )
        else:
            kinds = ", ".join(f"{kind} ({name})" for kind, name in KINDS.items())
            what = f"write {sign.upper()}" if sign.upper() in KINDS else f"use {kinds}"
            raise fault(place, f'"{sign}" is not a kind of layer; {what}')
        if len(groups[-1][0]) + len(item or ()) > MOST_LAYERS:
            raise fault(place, f"more than {MOST_LAYERS:,} layers; give fewer")
    if len(groups) > 1:
        raise fault(groups[-1][1], 'the bracket "(" is never closed; add a ")"')
    if item is None and text.strip():
        raise fault(text.rindex(","), "no layer after the last comma; name one, or remove it")
    return (*groups[0][0], *(item or ()))


def numbers(kind: str, kinds: Sequence[str]) -> tuple[int, ...]:
    """Returns the numbers, from 0, of the layers of a kind in a plan."""
    return tuple(layer for layer, other in enumerate(kinds) if other == kind)


@functools.lru_cache(maxsize=256)
def schedule(kinds: tuple[str, ...]) -> tuple[LayerRun | Loop, ...]:
    """Returns how to run a plan: runs of equal layers, with at most one loop over some of them.

    No other such form has fewer runs; there is no loop where it would not save any.
    """
    best: tuple[LayerRun | Loop, ...] = _runs(kinds)
    fewest, n = len(best), len(kinds)
    starts = [0, *(i for i in range(1, n) if kinds[i] != kinds[i - 1])]
    before = list(itertools.accumulate((int(i in set(starts)) for i in range(n)), initial=0))
    count = lambda a, b: before[b] - before[a + 1] + 1 if b > a else 0  # runs of kinds[a:b]
    for period in range(2, n // 2 + 1):
        end = n - period
        for start in range(end, -1, -1):
            if start < n - period and kinds[start] != kinds[start + period]:
                end = start
            # kinds[start : end + period] repeats with this period.
            times = (end - start) // period + 1
            stop = start + times * period
            total = count(0, start) + count(start, start + period) + count(stop, n)
            if times > 1 and total < fewest:
                loop = Loop(_runs(kinds[start : start + period]), times)
                best, fewest = (*_runs(kinds[:start]), loop, *_runs(kinds[stop:])), total
    return best


def _runs(kinds: Sequence[str]) -> tuple[LayerRun, ...]:
    return tuple(LayerRun(kind, len(list(equal))) for kind, equal in itertools.groupby(kinds))


def text(kinds: tuple[str, ...]) -> str:
    """Returns a plan's one spelling: ``parse`` of it gives the kinds."""
    return ",".join(
        _text(node)
        if isinstance(node, LayerRun)
        else f"({','.join(map(_text, node.body))})*{node.times}"
        for node in schedule(kinds)
    )


def _text(run: LayerRun) -> str:
    return run.kind if run.length == 1 else f"{run.kind}*{run.length}"
