"""The tables of sizes and training presets, as data.

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
