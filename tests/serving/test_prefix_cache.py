"""Which rows are kept, found and let go."""

import jax.numpy as jnp
import numpy as np

from mamba_jax.serving.prefix_cache import PrefixCache
from mamba_jax.serving.rows import Rows


def tokens(n, last=0):
    return np.array([*range(1, n), last], np.int32)


def row(mark):
    return Rows({"state": jnp.zeros((1, 6), jnp.float32)}, jnp.full((1, 4), mark, jnp.float32))


ROW_BYTES = 40


def test_the_longest_beginning_is_found_and_where_a_prompt_parts():
    cache = PrefixCache(10_000)
    cache.keep(tokens(20, last=20), row(1))
    cache.keep(tokens(30, last=0), row(2))
    found, length, parting, _ = cache.find(tokens(30, last=0))
    assert found is not None
    assert (float(found.logits_bv[0, 0]), length, parting) == (2, 30, 30)
    found, length, parting, _ = cache.find(tokens(40))
    assert found is not None
    assert (float(found.logits_bv[0, 0]), length, parting) == (1, 20, 29)
    assert cache.find(tokens(19)) == (None, 0, 18, False)
    assert cache.find(np.array([7, 8], np.int32)) == (None, 0, 0, False)


def test_short_beginnings_are_not_worth_it():
    cache = PrefixCache(10_000)
    cache.keep(tokens(15), row(1))
    assert len(cache) == 0
    cache.keep(tokens(20), row(1))
    assert cache.find(tokens(12)) == (None, 0, 0, False)


def test_bytes_are_bounded_and_the_least_recently_used_goes():
    size = ROW_BYTES + 20 * 4
    cache = PrefixCache(3 * size)
    for last in (101, 102, 103):
        cache.keep(tokens(20, last), row(last))
    assert cache.bytes == 3 * size
    assert cache.find(tokens(20, 101))[0] is not None
    cache.keep(tokens(20, 104), row(104))
    assert cache.bytes == 3 * size
    there = [cache.find(tokens(20, last))[1] == 20 for last in (101, 102, 103, 104)]
    assert there == [True, False, True, True]
    cache.keep(tokens(20, 104), row(104))  # twice is once
    assert (len(cache), cache.bytes) == (3, 3 * size)
    cache.keep(tokens(200), row(5))  # larger than all
    assert len(cache) == 3


def test_no_room_keeps_nothing():
    cache = PrefixCache(0)
    cache.keep(tokens(20), row(1))
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_longer_part_of_an_answer_takes_the_place_of_a_shorter():
    cache = PrefixCache(10_000)
    cache.keep(tokens(20), row(1))
    cache.keep(tokens(36), row(2), is_answer=True)
    cache.keep(tokens(52), row(3), is_answer=True, replaces=tokens(36))
    assert (len(cache), cache.bytes) == (2, 2 * ROW_BYTES + (20 + 52) * 4)
    assert cache.find(np.array([*tokens(52), 9], np.int32))[1:] == (52, 52, True)
    assert cache.find(np.array([*tokens(20), 9], np.int32))[1:] == (20, 20, False)
    cache.keep(tokens(68), row(4), is_answer=True, replaces=tokens(36))  # gone already
    assert len(cache) == 3
