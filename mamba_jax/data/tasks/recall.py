"""Associative recall: ``ba 3 ko 7 ze 1 ; ko ba =``; the difficulty is the number of pairs.

After multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): half of the keys are
queried, in another order.
"""

import numpy as np

from mamba_jax.data.tasks.names import choose_names

HARDEST = 100


def make(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Returns the prompt (pairs of key and digit, then keys) and those keys' digits, in order."""
    keys = choose_names(rng, difficulty)
    values = rng.integers(0, 10, difficulty).tolist()
    pairs = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    queried = rng.permutation(difficulty)[: -(-difficulty // 2)].tolist()
    queries = " ".join(keys[index] for index in queried)
    return f"{pairs} ; {queries} =", " ".join(str(values[index]) for index in queried)
