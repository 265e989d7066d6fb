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
        ("small", "mamba", "50M", 384, 6, 0, "Testing, edge devices"),
        ("medium-lite", "mamba", "90M", 512, 8, 0, "Balanced performance"),
        ("medium-plus", "mamba", "120M", 640, 9, 0, "Good quality"),
        ("medium-x", "mamba", "150M", 704, 10, 0, "High quality"),
        ("medium", "mamba", "200M", 768, 12, 0, "Production quality"),
        ("medium-extra", "mamba", "250M", 832, 13, 0, "Near-large quality"),
        ("large-lite", "mamba", "300M", 896, 14, 0, "Cost-effective large"),
        ("large-plus", "mamba", "400M", 960, 15, 0, "High performance"),
        ("large", "mamba", "500M", 1024, 16, 0, "Professional grade"),
        ("xlarge", "mamba", "750M", 1280, 20, 0, "Research, enterprise"),
        ("xxlarge", "mamba", "1B", 1536, 24, 0, "Maximum capability"),
        ("hybrid-small", "hybrid", "75M", 512, 8, 3, "Entry-level reasoning"),
        ("hybrid-small-mini", "hybrid", "100M", 576, 9, 3, "Balanced reasoning"),
        ("hybrid-small-standard", "hybrid", "112M", 608, 10, 3, "Recommended for 16 GB"),
        ("hybrid-small-plus", "hybrid", "125M", 640, 10, 3, "High-quality reasoning"),
        ("hybrid-small-pro", "hybrid", "165M", 704, 11, 3, "Maximum for 16 GB"),
        ("hybrid-medium", "hybrid", "220M", 768, 12, 3, "Professional reasoning"),
        ("hybrid-large", "hybrid", "550M", 1024, 16, 4, "Enterprise reasoning"),
    )
}

TRAINING_PRESETS: dict[str, TrainingPreset] = {
    "fast": TrainingPreset(5e-4, 1_000, 50_000, 2_500, 2_500, 1.0),
    "default": TrainingPreset(3e-4, 2_000, 100_000, 5_000, 5_000, 1.0),
    "careful": TrainingPreset(1e-4, 5_000, 200_000, 10_000, 10_000, 1.0),
}


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
    memory_gb: int


# Sources, as published by the vendors: NVIDIA's data sheets of H200, H100, A100, L4, T4 and V100,
# the white papers of the architectures GA102, AD102 and RTX Blackwell (rows with float32
# accumulation); Google Cloud's pages on the system architecture of each TPU. Cards of another form
# (NVL, laptop, SUPER, MIG slices) have other peaks, hence exact names.
DEVICES: tuple[Device, ...] = (
    Device("H200", ("NVIDIA H200",), 989.4, 494.7, 66.9, 66.9 / 16, 4800, 141),
    Device("H100-SXM", ("NVIDIA H100 80GB HBM3",), 989.4, 494.7, 66.9, 66.9 / 16, 3350, 80),
    Device("H100-PCIe", ("NVIDIA H100 PCIe",), 756.0, 378.0, 51.2, 51.2 / 16, 2000, 80),
    Device(
        "A100-40GB",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        *(312.0, 156.0, 19.5, 19.5 / 8, 1555, 40),
    ),
    Device("A100-80GB", ("NVIDIA A100-SXM4-80GB",), 312.0, 156.0, 19.5, 19.5 / 8, 2039, 80),
    Device("A100-80GB-PCIe", ("NVIDIA A100 80GB PCIe",), 312.0, 156.0, 19.5, 19.5 / 8, 1935, 80),
    Device("L4", ("NVIDIA L4",), 121.0, 60.0, 30.3, 30.3 / 16, 300, 24),
    Device("T4", ("Tesla T4",), 8.1, 8.1, 8.1, 8.1 / 8, 320, 16),
    Device(
        "V100",
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
        *(15.7, 15.7, 15.7, 15.7 / 8, 900, 32),
    ),
    Device("RTX-3090", ("NVIDIA GeForce RTX 3090",), 71.0, 35.6, 35.6, 35.6 / 16, 936, 24),
    Device("RTX-4080", ("NVIDIA GeForce RTX 4080",), 97.5, 48.7, 48.7, 48.7 / 16, 716.8, 16),
    Device("RTX-4090", ("NVIDIA GeForce RTX 4090",), 165.2, 82.6, 82.6, 82.6 / 16, 1008, 24),
    Device("RTX-5090", ("NVIDIA GeForce RTX 5090",), 209.5, 104.8, 104.8, 104.8 / 16, 1792, 32),
    Device("TPU-v4", ("TPU v4",), 275.0, 275.0, None, None, 1228, 32),
    Device("TPU-v5e", ("TPU v5 lite", "TPU v5e"), 197.0, 197.0, None, None, 819, 16),
    Device("TPU-v5p", ("TPU v5", "TPU v5p"), 459.0, 459.0, None, None, 2765, 95),
    Device("TPU-v6e", ("TPU v6 lite", "TPU v6e"), 918.0, 918.0, None, None, 1638, 32),
)
