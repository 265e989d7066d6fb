"""Nested arithmetic: ``(7 - (3 * 12)) + 4 =``; the difficulty is the number of operators."""

import operator

import numpy as np

HARDEST = 24
_LARGEST_NUMBER = 20
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def make(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Returns a fully bracketed expression over 0 … 20 with that many operators, and its value."""
    text, value = _expression(rng, difficulty)
    return f"{text} =", str(value)


def _expression(rng: np.random.Generator, operators: int) -> tuple[str, int]:
    if not operators:
        number = int(rng.integers(0, _LARGEST_NUMBER + 1))
        return str(number), number
    symbol = list(_OPERATORS)[rng.integers(len(_OPERATORS))]
    left_operators = int(rng.integers(operators))
    left, left_value = _operand(rng, left_operators)
    right, right_value = _operand(rng, operators - 1 - left_operators)
    return f"{left} {symbol} {right}", _OPERATORS[symbol](left_value, right_value)


def _operand(rng: np.random.Generator, operators: int) -> tuple[str, int]:
    text, value = _expression(rng, operators)
    return (f"({text})" if operators else text), value
