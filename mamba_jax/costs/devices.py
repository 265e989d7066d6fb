"""Published peaks of devices, as data, and what a compiler needs to know about them."""

import dataclasses

from mamba_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Cuda:
    """What a compiler needs to know about an NVIDIA card, at boost clock."""

    capability: str
    multiprocessors: int
    l2_cache_mib: int
    clock_ghz: float


@dataclasses.dataclass(frozen=True)
class Device:
    """The published peaks of one accelerator, dense (without structured sparsity), at boost clock.

    A GPU's special functions (exp2, log2, rsqrt …) run 16 a clock on each multiprocessor (NVIDIA's
    CUDA C++ documentation, arithmetic throughput, capabilities 7.0 to 12.0), against 64 or 128
    float32 multiply-adds: 1/8 or 1/16 of the float32 figure. TPUs' vector peaks are not published.
    """

    name: str  # for ``--device``
    kinds: tuple[str, ...]  # what jax calls it (``device_kind``)
    bfloat16_tflops: float  # matmuls, float32 accumulation; without such units, those of float32
    float32_tflops: float  # matmuls at jax's default precision: TF32, or bfloat16 on a TPU
    vector_tflops: float | None  # float32 outside matmuls
    special_tops: float | None
    memory_gb_per_sec: float
    memory_gb: int  # GiB: what a card's name rounds, up to 0.5% above what it reports
    cuda: Cuda | None = None  # of cards that the kernels compile for

    @property
    def memory_bytes(self) -> int:
        return self.memory_gb * 2**30


def _geforce(
    name: str, float32_tflops: float, bandwidth: float, memory_gb: int, cuda: Cuda
) -> Device:
    """A GeForce card: tensor cores make 2 (bfloat16) or 1 times the rest's float32 FLOPs."""
    peaks = 2 * float32_tflops, float32_tflops, float32_tflops, float32_tflops / 16
    kind = f"NVIDIA GeForce {name}"
    return Device(name.replace(" ", "-"), (kind,), *peaks, bandwidth, memory_gb, cuda)


_H100_PEAKS = (989.4, 494.7, 66.9, 66.9 / 16)


_A100_PEAKS = (312.0, 156.0, 19.5, 19.5 / 8)


_A100 = Cuda("8.0", 108, 40, 1.41)


# Sources, as published by the vendors: NVIDIA's data sheets of B200, H200, H100, A100, L40S, L4,
# A10, T4 and V100, the white papers of the architectures GA102, AD102 and RTX Blackwell (rows with
# float32 accumulation); Google Cloud's pages on the system architecture of each TPU. Other variants
# (NVL, laptop, MIG slices) have other peaks, so the names are exact.
DEVICES: tuple[Device, ...] = (
    Device(
        "B200",
        ("NVIDIA B200",),
        *(2250.0, 1125.0, 75.0, 75.0 / 16, 8000, 180, Cuda("10.0", 148, 126, 1.965)),
    ),
    Device("H200", ("NVIDIA H200",), *_H100_PEAKS, 4800, 141, Cuda("9.0", 132, 50, 1.98)),
    Device(
        "H100-SXM",
        ("NVIDIA H100 80GB HBM3",),
        *(*_H100_PEAKS, 3350, 80, Cuda("9.0", 132, 50, 1.98)),
    ),
    Device(
        "H100-PCIe",
        ("NVIDIA H100 PCIe",),
        *(756.0, 378.0, 51.2, 51.2 / 16, 2000, 80, Cuda("9.0", 114, 50, 1.755)),
    ),
    Device("A100-80GB", ("NVIDIA A100-SXM4-80GB",), *_A100_PEAKS, 2039, 80, _A100),
    Device("A100-80GB-PCIe", ("NVIDIA A100 80GB PCIe",), *_A100_PEAKS, 1935, 80, _A100),
    Device(
        "A100-40GB",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        *(*_A100_PEAKS, 1555, 40, _A100),
    ),
    Device(
        "L40S",
        ("NVIDIA L40S",),
        *(362.0, 183.0, 91.6, 91.6 / 16, 864, 48, Cuda("8.9", 142, 96, 2.52)),
    ),
    Device(
        "L4", ("NVIDIA L4",), *(121.0, 60.0, 30.3, 30.3 / 16, 300, 24, Cuda("8.9", 58, 48, 2.04))
    ),
    Device(
        "A10G",
        ("NVIDIA A10G",),
        *(70.0, 35.0, 35.0, 35.0 / 16, 600, 24, Cuda("8.6", 80, 6, 1.71)),
    ),
    Device("T4", ("Tesla T4",), 8.1, 8.1, 8.1, 8.1 / 8, 320, 16),
    Device(
        "V100",
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
        *(15.7, 15.7, 15.7, 15.7 / 8, 900, 32),
    ),
    _geforce("RTX 3060", 12.7, 360, 12, Cuda("8.6", 28, 3, 1.78)),
    _geforce("RTX 3070", 20.3, 448, 8, Cuda("8.6", 46, 4, 1.73)),
    _geforce("RTX 3080", 29.8, 760, 10, Cuda("8.6", 68, 5, 1.71)),
    _geforce("RTX 3090", 35.6, 936, 24, Cuda("8.6", 82, 6, 1.70)),
    _geforce("RTX 4070 Ti", 40.1, 504, 12, Cuda("8.9", 60, 48, 2.61)),
    _geforce("RTX 4080", 48.7, 716.8, 16, Cuda("8.9", 76, 64, 2.51)),
    _geforce("RTX 4080 SUPER", 52.2, 736, 16, Cuda("8.9", 80, 64, 2.55)),
    _geforce("RTX 4090", 82.6, 1008, 24, Cuda("8.9", 128, 72, 2.52)),
    _geforce("RTX 5090", 104.8, 1792, 32, Cuda("12.0", 170, 96, 2.41)),
    Device("TPU-v4", ("TPU v4",), 275.0, 275.0, None, None, 1228, 32),
    Device("TPU-v5e", ("TPU v5 lite", "TPU v5e"), 197.0, 197.0, None, None, 819, 16),
    Device("TPU-v5p", ("TPU v5", "TPU v5p"), 459.0, 459.0, None, None, 2765, 95),
    Device("TPU-v6e", ("TPU v6 lite", "TPU v6e"), 918.0, 918.0, None, None, 1638, 32),
)


def device_named(name: str) -> Device | None:
    """Returns the row that a user means, or jax names by its ``device_kind``; None: there is none.

    Case, spaces and hyphens do not matter; "4080" and "v5e" are enough, and "A100" is the first
    of its rows.
    """
    wanted = _words(name)
    for device in DEVICES:
        words = _words(device.name)
        short = words[1:] if words[0] in ("rtx", "tpu") else words[:1]
        if name in device.kinds or wanted in (words, short):
            return device
    return None


def device_of_flag(name: str) -> Device:
    """Returns the row that ``--device`` names.

    Raises:
      UserError: if there is none; it suggests the nearest.
    """
    device = device_named(name)
    if device is None:
        names = [device.name for device in DEVICES]
        near = did_you_mean(name.replace(" ", "-").upper(), names)
        raise UserError(f'unknown --device "{name}"{near} (choices: {", ".join(names)})')
    return device


def _words(name: str) -> list[str]:
    words = name.lower().replace("-", " ").split()
    return [word for word in words if word not in ("nvidia", "geforce")]
