"""List operations: ``[MAX 2 9 [MIN 4 7 ] 0 ] =``; the difficulty is the depth of nesting.

ListOps (Nangia & Bowman 2018, arXiv 1804.06028) over digits: the largest, the smallest, the median
(of an even number the mean of the two in the middle, rounded down) and the sum modulo 10.
"""

import statistics
from collections.abc import Sequence

import numpy as np

HARDEST = 12
_MOST_ARGUMENTS = 4
_SHARE_NESTED = 0.25  # of the arguments besides the one that makes the depth


def _median(values: Sequence[int]) -> int:
    return int(statistics.median(values))


def _sum_modulo(values: Sequence[int]) -> int:
    return sum(values) % 10


_OPERATIONS = {"MAX": max, "MIN": min, "MED": _median, "SM": _sum_modulo}


def make(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Returns a list nested exactly ``difficulty`` deep, and its value, a digit."""
    text, value = _list(rng, difficulty)
    return f"{text} =", str(value)


def _list(rng: np.random.Generator, depth: int) -> tuple[str, int]:
    if not depth:
        digit = int(rng.integers(10))
        return str(digit), digit
    name = list(_OPERATIONS)[rng.integers(len(_OPERATIONS))]
    count = int(rng.integers(2, _MOST_ARGUMENTS + 1))
    deepest = int(rng.integers(count))
    arguments = []
    for number in range(count):
        # Only one is nested to the full depth, so that the length grows linearly with it.
        below = depth - 1 if number == deepest else int(depth > 1 and rng.random() < _SHARE_NESTED)
        arguments.append(_list(rng, below))
    texts, values = zip(*arguments, strict=True)
    return f"[{name} {' '.join(texts)} ]", _OPERATIONS[name](values)
