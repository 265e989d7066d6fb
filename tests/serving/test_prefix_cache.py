"""Which states are cached, found and evicted."""

import jax.numpy as jnp
import numpy as np

from mamba_jax.serving.prefix_cache import PrefixCache
from mamba_jax.serving.slots import Slots


def tokens(n, last=0):
    return np.array([*range(1, n), last], np.int32)


def state(mark):
    return Slots({"state": jnp.zeros((1, 6), jnp.float32)}, jnp.full((1, 4), mark, jnp.float32))


STATE_BYTES = 40


def test_the_longest_prefix_and_the_point_of_divergence_are_found():
    cache = PrefixCache(10_000)
    cache.add(tokens(20, last=20), state(1))
    cache.add(tokens(30, last=0), state(2))
    found, length, parting, _ = cache.find(tokens(30, last=0))
    assert found is not None
    assert (float(found.logits_bv[0, 0]), length, parting) == (2, 30, 30)
    found, length, parting, _ = cache.find(tokens(40))
    assert found is not None
    assert (float(found.logits_bv[0, 0]), length, parting) == (1, 20, 29)
    assert cache.find(tokens(19)) == (None, 0, 18, False)
    assert cache.find(np.array([7, 8], np.int32)) == (None, 0, 0, False)


def test_short_prefixes_are_not_cached():
    cache = PrefixCache(10_000)
    cache.add(tokens(15), state(1))
    assert len(cache) == 0
    cache.add(tokens(20), state(1))
    assert cache.find(tokens(12)) == (None, 0, 0, False)


def test_bytes_are_bounded_and_the_least_recently_used_is_evicted():
    size = STATE_BYTES + 20 * 4
    cache = PrefixCache(3 * size)
    for last in (101, 102, 103):
        cache.add(tokens(20, last), state(last))
    assert cache.bytes == 3 * size
    assert cache.find(tokens(20, 101))[0] is not None
    cache.add(tokens(20, 104), state(104))
    assert cache.bytes == 3 * size
    there = [cache.find(tokens(20, last))[1] == 20 for last in (101, 102, 103, 104)]
    assert there == [True, False, True, True]
    cache.add(tokens(20, 104), state(104))  # twice is once
    assert (len(cache), cache.bytes) == (3, 3 * size)
    cache.add(tokens(200), state(5))  # larger than all
    assert len(cache) == 3


def test_a_size_of_zero_caches_nothing():
    cache = PrefixCache(0)
    cache.add(tokens(20), state(1))
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_longer_part_of_an_answer_replaces_a_shorter_one():
    cache = PrefixCache(10_000)
    cache.add(tokens(20), state(1))
    cache.add(tokens(36), state(2), is_answer=True)
    cache.add(tokens(52), state(3), is_answer=True, replaces=tokens(36))
    assert (len(cache), cache.bytes) == (2, 2 * STATE_BYTES + (20 + 52) * 4)
    assert cache.find(np.array([*tokens(52), 9], np.int32))[1:] == (52, 52, True)
    assert cache.find(np.array([*tokens(20), 9], np.int32))[1:] == (20, 20, False)
    cache.add(tokens(68), state(4), is_answer=True, replaces=tokens(36))  # gone already
    assert len(cache) == 3
