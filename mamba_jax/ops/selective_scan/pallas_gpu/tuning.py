"""Which tiles to use."""

import dataclasses

from mamba_jax.ops.selective_scan.pallas_gpu.shell import Tile


@dataclasses.dataclass(frozen=True)
class Plan:
    forward: Tile = Tile()
    backward: Tile = Tile()
    chunk_tokens: int = 32
    forward_segments: int = 1
    backward_segments: int = 1


def choose(b, t, e, n) -> Plan:
    return Plan()
