"""What a device can do at best, and the least time that a model's parts take on it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from mamba_jax.costs.devices import DEVICES, Device
from mamba_jax.costs.work import Work

_REPEATS = 5  # the fastest counts: a peak is the undisturbed rate


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Rates of one device; None where neither published nor measured."""

    name: str
    origin: str  # "vendor-published" or "measured here"
    matmul_flops_per_sec: float
    elementwise_flops_per_sec: float | None
    special_ops_per_sec: float | None
    bytes_per_sec: float

    def secs(self, work: Work) -> float:
        """Returns the least time for a work: that of its slowest resource, all others hidden."""
        rates = (
            (work.matmul_flops, self.matmul_flops_per_sec),
            (work.elementwise_flops, self.elementwise_flops_per_sec),
            (work.special_ops, self.special_ops_per_sec),
            (work.bytes, self.bytes_per_sec),
        )
        return max(amount / rate for amount, rate in rates if rate is not None)


def floor_secs(works: Iterable[Work], peaks: Peaks) -> float:
    """Returns the least time for parts that follow one another: each at its own limit."""
    return sum(peaks.secs(work) for work in works)


def find_device(device_kind: str) -> Device | None:
    """Returns the table's row of what jax calls ``device_kind``; None: it has none."""
    return next((device for device in DEVICES if device_kind in device.kinds), None)


def published(device: Device, dtype: str) -> Peaks:
    """Returns a device's peaks for matmuls of a dtype, "bfloat16" or "float32"."""
    tera = lambda figure: None if figure is None else figure * 1e12
    matmul = device.bfloat16_tflops if dtype == "bfloat16" else device.float32_tflops
    return Peaks(
        name=device.name,
        origin="vendor-published",
        matmul_flops_per_sec=matmul * 1e12,
        elementwise_flops_per_sec=tera(device.vector_tflops),
        special_ops_per_sec=tera(device.special_tops),
        bytes_per_sec=device.memory_gb_per_sec * 1e9,
    )


def device_kind() -> str:
    """Returns what jax calls the first device here."""
    return jax.local_devices()[0].device_kind


@functools.cache
def measure(dtype: str) -> Peaks:
    """Measures the first device: a large product, a copy, and many multiply-adds and exps.

    Takes some seconds the first time. These run over an array read once, so that memory does not
    limit them, and side by side: in one chain each would wait for the one before.
    """
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    size, numbers = (2048, 2**18) if on_cpu else (8192, 2**26)
    chains, links, terms = 8, 16, 32
    square = jax.device_put(jnp.full((size, size), 0.5, dtype), device)
    # Larger than any cache; the other need not be.
    long = jax.device_put(jnp.full(2**27 if on_cpu else 2**29, 0.5, jnp.float32), device)
    line = jax.device_put(jnp.linspace(0.0, 0.8, numbers, dtype=jnp.float32), device)

    def multiply_adds(x: jax.Array) -> jax.Array:
        each = [x * (1 - chain / 16) for chain in range(chains)]
        for _ in range(links):
            each = [y * y + 0.1 for y in each]
        return sum(each[1:], each[0])

    def exps(x: jax.Array) -> jax.Array:
        return sum((jnp.exp(x * (term / terms)) for term in range(1, terms)), jnp.exp(x))

    matmul = lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)
    return Peaks(
        name=device.device_kind,
        origin="measured here",
        matmul_flops_per_sec=2 * size**3 / _fastest_secs(matmul, square),
        elementwise_flops_per_sec=2 * chains * links * numbers / _fastest_secs(multiply_adds, line),
        special_ops_per_sec=terms * numbers / _fastest_secs(exps, line),
        bytes_per_sec=2 * long.nbytes / _fastest_secs(lambda x: x + 1, long, in_place=True),
    )


def _fastest_secs(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_place: bool = False
) -> float:
    """Times a function; ``in_place``: on its own result, overwriting ``x``, which is donated.

    A new result of some size costs a CPU more than the copy itself: the system's fresh pages.
    """
    compiled = jax.jit(function, donate_argnums=0 if in_place else ()).lower(x).compile()
    y = compiled(x).block_until_ready()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        y = compiled(y if in_place else x).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
