"""Compiles for cards that this machine does not have, to read what a program needs there.

``scripts/compilers.sh`` installs the compilers into ``.compilers``, which must be on the path of a
process of its own: ``PYTHONPATH=.compilers JAX_PLATFORMS=cpu python …``. Then

    sharding = cuda_target("H200")
    shape = jax.ShapeDtypeStruct((8, 2048), jnp.float32, sharding=sharding)
    compile_for(function, shape).memory_analysis()
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mamba_jax.costs.devices import DEVICES, Device, device_named
from mamba_jax.errors import UserError, did_you_mean

# By compute capability (NVIDIA's CUDA C++ documentation, table of technical specifications):
# float32 lanes, threads and bytes of shared memory of a multiprocessor.
LIMITS = {
    "8.0": (64, 2048, 164 * 1024),
    "8.6": (128, 1536, 100 * 1024),
    "8.9": (128, 1536, 100 * 1024),
    "9.0": (128, 2048, 228 * 1024),
    "10.0": (128, 2048, 228 * 1024),
    "12.0": (128, 1536, 100 * 1024),
}
# Generation → (smallest topology, as libtpu names it, and its type).
TPUS = {
    "v4": ("v4:2x2x1", "v4-8"),
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
}


def cuda_target(card: str) -> SingleDeviceSharding:
    """Returns the sharding that compiles for one such card.

    Call it before the process compiles anything: XLA reads its flags once.

    Args:
      card: a name such as "RTX 4080", or a compute capability such as "8.9", which means a card
        with it.

    Raises:
      UserError: if the card is unknown or the compilers are not installed.
    """
    capabilities = {}
    for device in DEVICES:
        if device.cuda is not None:
            capabilities[device.cuda.capability] = device
    device = capabilities.get(card) or device_named(card)
    if device is None or device.cuda is None:
        names = [device.name for device in DEVICES if device.cuda is not None]
        raise UserError(
            f'unknown card "{card}"{did_you_mean(card, names)} '
            f"(choices: {', '.join([*names, *capabilities])})"
        )
    plugin = _need("jax_plugins.xla_cuda12")
    cuda = plugin.parents[1] / "nvidia" / "cuda_nvcc"
    os.environ["PATH"] = f"{cuda / 'bin'}{os.pathsep}{os.environ['PATH']}"  # where ptxas is
    # There is no card on which to measure candidates, and libdevice has to be located.
    flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    jax.devices()  # lets jax find the compiler
    topology = topologies.get_topology_desc(
        "1x1x1", "cuda", target_config=_target_config(device), topology="1x1x1"
    )
    return SingleDeviceSharding(topology.devices[0])


def tpu_target(generation: str) -> SingleDeviceSharding:
    """Returns the sharding that compiles for one chip of a generation, such as "v5e".

    Raises:
      UserError: if the generation is unknown or the compiler is not installed.
    """
    if generation not in TPUS:
        raise UserError(f'unknown TPU "{generation}" (choices: {", ".join(TPUS)})')
    _need("libtpu")
    topology, kind = TPUS[generation]
    os.environ |= {  # else libtpu asks the cloud which machine this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": kind,
        "TPU_SKIP_MDS_QUERY": "1",
    }
    return SingleDeviceSharding(topologies.get_topology_desc(topology, "tpu").devices[0])


def compile_for(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function for the target that the shardings of its arguments name.

    Args:
      function: to be compiled.
      *arguments: trees of ``jax.ShapeDtypeStruct`` with a sharding of ``cuda_target`` or
        ``tpu_target``.
    """
    device = next(iter(jax.tree.leaves(arguments)[0].sharding.device_set))
    if device.platform == "tpu" or jax.__version_info__ < (0, 11):
        return jax.jit(function).lower(*arguments).compile()
    # Newer versions of jax lower a kernel for an abstract device only, and then do not compile it.
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform="gpu")
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    kernel = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with use_abstract_mesh(AbstractMesh((1,), ("card",), abstract_device=kind)):
        exported = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=[kernel]
        )(*plain)
    return jax.jit(exported.call).lower(*arguments).compile()


def _need(module: str) -> pathlib.Path:
    """Returns the folder of an importable package."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the package above it
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            f"{module} is not importable: run ./scripts/compilers.sh, then set "
            "PYTHONPATH=.compilers and JAX_PLATFORMS=cpu"
        )
    return pathlib.Path(spec.origin).resolve().parent


def _target_config(device: Device) -> str:
    """XLA's description of a card (a GpuTargetConfigProto as text)."""
    card = device.cuda
    assert card is not None
    major, minor = card.capability.split(".")
    fpus, threads, shared_bytes = LIMITS[card.capability]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_bytes}
  shared_memory_per_block_optin: {shared_bytes - 1024}
  core_count: {card.multiprocessors} fpus_per_core: {fpus} clock_rate_ghz: {card.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {int(device.memory_gb_per_sec * 1e9)} device_memory_size: {device.memory_bytes}
  l2_cache_size: {card.l2_cache_mib * 2**20}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{device.kinds[0]}"
"""
