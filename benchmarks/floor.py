"""The least time a selective scan can take on a card, from what it must move and compute.

Counts per channel and token for N = 16 with bfloat16 inputs, of a kernel that keeps the state in
registers, fuses softplus, skip and gate, and makes states again in its backward:

            bytes of DRAM    special-function operations    issue slots per 32 channels (one warp)
  forward   9                20 (16 exps, 4 for the rest)   175
  backward  19               25                             471

The time is that of the slowest of the three; how fast each goes is the card's.
"""

import dataclasses
import re

N_STATES = 16  # that the counts are for
FORWARD = (9.0, 20.0, 175.0)
BACKWARD = (19.0, 25.0, 471.0)
WARP = 32
SPECIAL_PER_CLOCK = 16  # results of a multiprocessor's special-function units, from 8.0 to 12.0
ISSUES_PER_CLOCK = 4  # one per scheduler
DRAM_EFFICIENCY = 0.9  # what a plain copy reaches of the rated bandwidth


@dataclasses.dataclass(frozen=True)
class Card:
    """Rated figures, from the vendor's data sheets."""

    multiprocessors: int
    boost_hz: float
    dram_bytes_per_sec: float


# By a part of jax.devices()[0].device_kind; the first that fits counts, so longer names come first.
CARDS = {
    "B200": Card(148, 1.965e9, 8.0e12),
    "H200": Card(132, 1.98e9, 4.8e12),
    "H100 PCIe": Card(114, 1.755e9, 2.0e12),
    "H100": Card(132, 1.98e9, 3.35e12),
    "A100-SXM4-40GB": Card(108, 1.41e9, 1.555e12),
    "A100": Card(108, 1.41e9, 2.039e12),
    "L40S": Card(142, 2.52e9, 0.864e12),
    "L4": Card(58, 2.04e9, 0.300e12),
    "A10G": Card(80, 1.71e9, 0.600e12),
    "RTX 5090": Card(170, 2.407e9, 1.792e12),
    "RTX 4090": Card(128, 2.52e9, 1.008e12),
    "RTX 4080 SUPER": Card(80, 2.55e9, 0.736e12),
    "RTX 4080": Card(76, 2.505e9, 0.717e12),
    "RTX 3090": Card(82, 1.695e9, 0.936e12),
}


def find_card(device_kind: str) -> Card | None:
    """Returns the card of this name, or None: then there is no floor to compare with."""
    if "Laptop" in device_kind:  # same name, other clocks
        return None
    fits = lambda name: re.search(rf"\b{name}\b", device_kind)
    return next((card for name, card in CARDS.items() if fits(name)), None)


def floor_secs(card: Card, channel_tokens: int, *, backward: bool) -> float:
    """The least seconds of a forward, or of a forward and a backward.

    Args:
      card: that runs it.
      channel_tokens: batch × length × width.
      backward: whether the backward follows.
    """
    passes = [FORWARD, BACKWARD] if backward else [FORWARD]
    return sum(_pass_secs(card, channel_tokens, *counts) for counts in passes)


def _pass_secs(
    card: Card, channel_tokens: int, n_bytes: float, special: float, issues: float
) -> float:
    clocks_per_sec = card.multiprocessors * card.boost_hz
    return channel_tokens * max(
        n_bytes / (DRAM_EFFICIENCY * card.dram_bytes_per_sec),
        special / (SPECIAL_PER_CLOCK * clocks_per_sec),
        issues / WARP / (ISSUES_PER_CLOCK * clocks_per_sec),
    )
