"""The floor against arithmetic done by hand."""

import math

import pytest

from benchmarks import floor


@pytest.mark.parametrize(
    "backward, expected_tokens_per_sec",
    # An H200 at width 1536: 132 multiprocessors × 4 schedulers × 1.98 GHz issue 1.0454e12 warp
    # instructions a second, for 1536 / 32 = 48 warps of 175 (forward) or 471 (backward) each;
    # a forward with a backward takes the sum of both times.
    [
        (False, 1.04544e12 / (48 * 175)),
        (True, 1 / (48 * 175 / 1.04544e12 + 48 * 471 / 1.04544e12)),
    ],
)
def test_an_h200_is_bound_by_issue(backward, expected_tokens_per_sec):
    card = floor.find_card("NVIDIA H200")
    secs = floor.floor_secs(card, 1536, backward=backward)
    assert math.isclose(1 / secs, expected_tokens_per_sec, rel_tol=1e-12)


def test_special_functions_or_memory_can_be_the_bound():
    # One multiprocessor at 1 Hz makes 16 special functions a second: 20 / 16 s; issue takes
    # 175 / 32 / 4 = 1.367 s and is the longest until memory is slower still.
    card = floor.Card(1, 1.0, 1e9)
    assert floor.floor_secs(card, 1, backward=False) == 175 / 128
    slow = floor.Card(1, 1.0, 1.0)
    assert floor.floor_secs(slow, 2, backward=False) == pytest.approx(2 * 9 / 0.9, rel=1e-12)


@pytest.mark.parametrize(
    "name, multiprocessors",
    [
        ("NVIDIA H100 80GB HBM3", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA A100-SXM4-80GB", 108),
        ("NVIDIA GeForce RTX 4080", 76),
        ("NVIDIA GeForce RTX 4080 SUPER", 80),
        ("NVIDIA L4", 58),
        ("NVIDIA L40S", 142),
    ],
)
def test_a_card_is_found_by_its_own_name(name, multiprocessors):
    assert floor.find_card(name).multiprocessors == multiprocessors


@pytest.mark.parametrize("name", ["cpu", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_an_unknown_card_has_no_floor(name):
    assert floor.find_card(name) is None
