"""State tracking: ``c a e b d ; 1-3 2-5 =``; the difficulty is the number of swaps.

Five things in five positions, two of which are swapped at a time: words over the permutation group
S5, which no constant-depth model tracks at every length (Merrill et al. 2024, arXiv 2404.08819).
"""

import numpy as np

HARDEST = 256
_THINGS = "abcde"


def make(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Returns the prompt (an arrangement and swaps) and the arrangement after the swaps."""
    things = [_THINGS[index] for index in rng.permutation(len(_THINGS))]
    start, swaps = " ".join(things), []
    for _ in range(difficulty):
        one, other = sorted(rng.permutation(len(things))[:2].tolist())
        swaps.append(f"{one + 1}-{other + 1}")
        things[one], things[other] = things[other], things[one]
    return f"{start} ; {' '.join(swaps)} =", " ".join(things)
