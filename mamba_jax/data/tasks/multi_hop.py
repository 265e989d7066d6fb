"""Multi-hop lookup: ``ba>ko ze>mi ko>ra mi>fu ; ba 2 =``; the difficulty is the number of hops.

The facts are two chains of equal length, shuffled, so that neither a name's frequency nor its
position gives the answer away.
"""

import itertools

import numpy as np

from mamba_jax.data.tasks.names import choose_names

HARDEST = 40


def make(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Returns the prompt (facts, a start, the number of hops) and where the hops lead."""
    names = choose_names(rng, 2 * (difficulty + 1))
    chains = names[: difficulty + 1], names[difficulty + 1 :]
    facts = [f"{here}>{there}" for chain in chains for here, there in itertools.pairwise(chain)]
    shuffled = " ".join(facts[index] for index in rng.permutation(len(facts)))
    chain = chains[0]
    return f"{shuffled} ; {chain[0]} {difficulty} =", chain[-1]
