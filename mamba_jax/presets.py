"""The tables of sizes, training presets and devices, as data.

``d_model``, ``n_layers`` and ``depth`` govern. ``nominal`` is only the label under which a size is
known: the true parameter count follows from the structure (``python -m mamba_jax.report presets``)
and is printed beside it everywhere.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SizePreset:
    """One model size: the structure and the labels it is known by."""

    name: str
    family: str  # "mamba" or "hybrid"
    nominal: str  # the label, not a count
    d_model: int
    n_layers: int
    depth: int  # recursion steps; 0 for plain Mamba
    use_case: str
    parameters: int  # with the GPT-2 vocabulary; a test holds it to the structure


@dataclasses.dataclass(frozen=True)
class TrainingPreset:
    """One training schedule."""

    learning_rate: float
    warmup_steps: int
    max_steps: int
    save_steps: int
    eval_steps: int
    gradient_clip: float


SIZES: dict[str, SizePreset] = {
    row[0]: SizePreset(*row)
    for row in (
        ("small", "mamba", "50M", 384, 6, 0, "Testing, edge devices", 25_102_464),
        ("medium-lite", "mamba", "90M", 512, 8, 0, "Balanced performance", 39_318_016),
        ("medium-plus", "mamba", "120M", 640, 9, 0, "Good quality", 55_874_560),
        ("medium-x", "mamba", "150M", 704, 10, 0, "High quality", 67_172_160),
        ("medium", "mamba", "200M", 768, 12, 0, "Production quality", 83_894_016),
        ("medium-extra", "mamba", "250M", 832, 13, 0, "Near-large quality", 99_297_536),
        ("large-lite", "mamba", "300M", 896, 14, 0, "Cost-effective large", 116_712_064),
        ("large-plus", "mamba", "400M", 960, 15, 0, "High performance", 136_291_200),
        ("large", "mamba", "500M", 1024, 16, 0, "Professional grade", 158_188_544),
        ("xlarge", "mamba", "750M", 1280, 20, 0, "Research, enterprise", 272_032_000),
        ("xxlarge", "mamba", "1B", 1536, 24, 0, "Maximum capability", 435_254_784),
        ("hybrid-small", "hybrid", "75M", 512, 8, 3, "Entry-level reasoning", 60_315_352),
        ("hybrid-small-mini", "hybrid", "100M", 576, 9, 3, "Balanced reasoning", 78_105_870),
        ("hybrid-small-standard", "hybrid", "112M", 608, 10, 3, "Recommended on 16GB", 91_368_440),
        ("hybrid-small-plus", "hybrid", "125M", 640, 10, 3, "High-quality reasoning", 99_505_610),
        ("hybrid-small-pro", "hybrid", "165M", 704, 11, 3, "Maximum for 16 GB", 124_913_932),
        ("hybrid-medium", "hybrid", "220M", 768, 12, 3, "Professional reasoning", 154_730_196),
        ("hybrid-large", "hybrid", "550M", 1024, 16, 4, "Enterprise reasoning", 326_078_272),
    )
}

TRAINING_PRESETS: dict[str, TrainingPreset] = {
    "fast": TrainingPreset(5e-4, 1_000, 50_000, 2_500, 2_500, 1.0),
    "default": TrainingPreset(3e-4, 2_000, 100_000, 5_000, 5_000, 1.0),
    "careful": TrainingPreset(1e-4, 5_000, 200_000, 10_000, 10_000, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Cuda:
    """What a compiler has to know of an NVIDIA card, at boost clock."""

    capability: str
    multiprocessors: int
    l2_cache_mib: int
    clock_ghz: float


@dataclasses.dataclass(frozen=True)
class Device:
    """The published peaks of one accelerator, dense (without structured sparsity), at boost clock.

    A GPU's special functions (exp2, log2, rsqrt …) run 16 a clock on each multiprocessor (CUDA C++
    programming guide, arithmetic throughput, capabilities 7.0 to 12.0), against 64 or 128 float32
    multiply-adds: 1/8 or 1/16 of the float32 figure. A TPU's vector peaks are not published.
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
# float32 accumulation); Google Cloud's pages on the system architecture of each TPU. Cards of
# another form (NVL, laptop, MIG slices) have other peaks, hence exact names.
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

    Case, spaces and hyphens do not matter; "4080" and "v5e" will do, and "A100" is the first of its
    rows.
    """
    asked = _words(name)
    for device in DEVICES:
        words = _words(device.name)
        short = words[1:] if words[0] in ("rtx", "tpu") else words[:1]
        if name in device.kinds or asked in (words, short):
            return device
    return None


def _words(name: str) -> list[str]:
    words = name.lower().replace("-", " ").split()
    return [word for word in words if word not in ("nvidia", "geforce")]
