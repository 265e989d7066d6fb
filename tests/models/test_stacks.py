"""Layers run from stacks against a loop over them one by one, in integers: equal to the bit."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config.plan import schedule
from mamba_jax.models import stacks

PLANS = ["M", "MMM", "MHM", "AMHMA", "MMHMMH", "AMMHMMHA", "AMAMAMH"]
PLANS += ["".join(random.Random(seed).choices("MAH", k=9)) for seed in range(6)]


def apply(kind, x, number, key):
    """A toy layer whose result depends on its kind, number and key, and on the order of layers."""
    return 3 * x + "MAH".index(kind) + 5 * number + jax.random.key_data(key)[0]


@pytest.mark.parametrize("plan", PLANS)
def test_layers_run_in_the_order_of_the_plan_each_with_its_own_part(plan):
    kinds = tuple(plan)
    numbers = jnp.arange(len(kinds), dtype=jnp.uint32)
    keys = jax.random.split(jax.random.key(0), len(kinds))
    own_numbers, own_keys = (stacks.sorted_by_kind(of, kinds) for of in (numbers, keys))

    def layer(kind, looped):
        def run(x, own):
            x = apply(kind, x, *own)
            return x, (x, own[0])

        return run

    with jax.disable_jit():  # nothing to compile
        x, made = stacks.run(
            layer,
            jnp.uint32(1),
            {kind: (own_numbers[kind], own_keys[kind]) for kind in kinds},
            schedule(kinds),
        )
    truth = [jnp.uint32(1)]
    for number, kind in enumerate(kinds):
        truth.append(apply(kind, truth[-1], numbers[number], keys[number]))
    assert x == truth[-1]
    results = stacks.in_order({kind: of for kind, (of, _) in made.items()}, kinds)
    np.testing.assert_array_equal(results, truth[1:])
    whole = stacks.joined({kind: of for kind, (_, of) in made.items()}, kinds)
    np.testing.assert_array_equal(stacks.unstack(whole, kinds), numbers)


def test_a_layer_is_told_whether_it_is_in_a_loop():
    """On that depends how its rematerialisation is kept apart from the forward."""
    told = []

    def layer(kind, looped):
        told.append((kind, looped))
        return lambda x, own: (x, own)

    kinds = tuple("AMMHMMHH")  # A,(M*2,H)*2,H
    parts = {kind: jnp.zeros(kinds.count(kind)) for kind in kinds}
    stacks.run(layer, jnp.zeros(()), parts, schedule(kinds))
    assert told == [("A", False), ("M", True), ("H", True), ("H", False)]
