"""Two-letter names for things."""

import numpy as np

_NAMES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]


def choose_names(rng: np.random.Generator, count: int) -> list[str]:
    """Returns different names, at most 100."""
    return [_NAMES[index] for index in rng.permutation(len(_NAMES))[:count]]
