"""What a run trains on: devices, the cost of a token there, memory in use."""

import dataclasses
import resource
import sys

import jax

from mamba_jax.config import RunConfig
from mamba_jax.costs.flops import model_flops
from mamba_jax.costs.roofline import find_device, published
from mamba_jax.models.language_model import matmul_dtype


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices of a run, and the cost of a token there."""

    device_kind: str
    device_count: int
    model_flops: float  # per trained token
    peak_flops_per_sec: float | None  # of all devices in matmuls; None: not known

    def measures(self, tokens_per_sec: float) -> dict[str, float]:
        """Returns ``tflops``, the model's per second, and ``mfu``, their share of the peak."""
        flops_per_sec = self.model_flops * tokens_per_sec
        measures = {"tflops": flops_per_sec / 1e12}
        if self.peak_flops_per_sec is not None:
            measures["mfu"] = flops_per_sec / self.peak_flops_per_sec
        return measures


def find_hardware(config: RunConfig, mesh: jax.sharding.Mesh) -> Hardware:
    """Returns the devices of a mesh with their published peak, if they have one."""
    device = mesh.devices.flat[0]
    known = find_device(device.device_kind)
    peak = None
    if known is not None:
        peaks = published(known, matmul_dtype(config.model).name)
        peak = mesh.size * peaks.matmul_flops_per_sec
    cost = model_flops(config.model, config.model.max_seq_len)
    return Hardware(device.device_kind, mesh.size, cost, peak)


def device_memory_bytes() -> int:
    """Returns the peak of device memory in use; on CPU, of this process's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
