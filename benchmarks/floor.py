"""The least time a selective scan can take on a card, from what it must move and compute.

Counts per channel and token for N = 16 with bfloat16 inputs, of a kernel that keeps the state in
registers, fuses softplus, skip and gate, and recomputes states in its backward pass:

            bytes of DRAM    special-function operations    issue slots per 32 channels (one warp)
  forward   9                20 (16 exps, 4 for the rest)   175
  backward  19               25                             471

The time is that of the slowest of the three, at the card's rates.
"""

import dataclasses

from mamba_jax.costs.roofline import find_device

N_STATES = 16  # the state size that the counts are for
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


def find_card(device_kind: str) -> Card | None:
    """Returns the card of this name, or None: then there is no floor to compare with."""
    device = find_device(device_kind)
    if device is None or device.cuda is None:
        return None
    cuda = device.cuda
    return Card(cuda.multiprocessors, cuda.clock_ghz * 1e9, device.memory_gb_per_sec * 1e9)


def floor_secs(card: Card, channel_tokens: int, *, backward: bool) -> float:
    """The least seconds of a forward pass, or of forward and backward.

    Args:
      card: the card that runs it.
      channel_tokens: batch × length × width.
      backward: whether the backward pass follows.
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
