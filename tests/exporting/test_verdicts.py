"""What verification accepts, without an engine."""

import numpy as np
import pytest

from mamba_jax.errors import UserError
from mamba_jax.exporting import tensors, verify
from tests.support.made import UNTIED, random_params


@pytest.fixture
def ours():
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    return verify._Ours(table, table, UNTIED)


LOGITS = np.array([[0.0, 3.0, 4.0], [5.0, 1.0, 2.0]], np.float32)


def test_differences_within_rounding_pass(ours):
    ours.compare(LOGITS, LOGITS + np.float32(4e-4))
    ours.compare_greedy(LOGITS, np.array([2, 2]), eot_id=0)  # the most likely except the end
    found = ours.verdict("f32", same_text=True)
    assert found.largest_difference == pytest.approx(4e-4, rel=1e-3) and found.largest_value == 5
    assert (found.same_greedy, found.n_greedy) == (2, 2)


@pytest.mark.parametrize("wrong", [6e-4, np.nan])
def test_larger_differences_fail(ours, wrong):
    ours.compare(LOGITS, LOGITS + np.float32(wrong))
    ours.compare(LOGITS, LOGITS)  # so that a NaN is not lost
    with pytest.raises(UserError, match="verification failed: logits differ"):
        ours.verdict("f32", same_text=False)


def test_nothing_compared_is_nothing_verified(ours):
    with pytest.raises(UserError, match="verification failed"):
        ours.verdict("f32", same_text=False)


def test_another_text_fails_where_texts_must_be_equal(ours):
    ours.compare(LOGITS, LOGITS)
    ours.compare_greedy(LOGITS, np.array([2, 0]), eot_id=1)
    ours.compare_greedy(LOGITS, np.array([1, 0]), eot_id=1)
    assert ours.verdict("f32", same_text=False).same_greedy == 3
    with pytest.raises(UserError, match="3 of 4 greedy tokens are the same"):
        ours.verdict("f32", same_text=True)


def test_other_tokens_fail():
    verify._check_ids("text", [1, 2], np.array([1, 2]))
    with pytest.raises(UserError, match="tokenizers give different ids for 'text'"):
        verify._check_ids("text", [1, 2], np.array([1, 3]))
