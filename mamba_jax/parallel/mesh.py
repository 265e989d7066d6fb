"""The device mesh and the sharding of a batch."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamba_jax.config import ParallelConfig
from mamba_jax.errors import UserError

DATA = "data"  # devices along it hold copies of the parameters
FSDP = "fsdp"  # devices along it share one copy of parameters and optimizer state


def make_mesh(config: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as (data, fsdp).

    The batch is divided over both axes, the parameters over ``fsdp`` alone. The axis types are
    Auto: XLA inserts the communication that the shardings of inputs and outputs call for.

    Args:
      config: ``fsdp`` devices share a copy of the parameters; the data axis takes the rest.
      devices: the devices to use; every device by default.

    Raises:
      UserError: if ``fsdp`` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, fsdp = len(devices), config.fsdp
    if count % fsdp:
        divisors = ", ".join(str(i) for i in range(1, count + 1) if count % i == 0)
        raise UserError(
            f"parallel.fsdp={fsdp} does not divide the {count} device(s) of this machine; "
            f"choose one of {divisors}"
        )
    shape = (count // fsdp, fsdp)
    return jax.make_mesh(shape, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Checks that every device gets the same number of sequences of a microbatch.

    Args:
      batch_size: sequences in a microbatch, over all devices (``vram.batch_size``).
      mesh: the devices.

    Raises:
      UserError: if the number of devices does not divide ``batch_size``.
    """
    if batch_size % mesh.size:
        above = math.ceil(batch_size / mesh.size) * mesh.size
        raise UserError(
            f"vram.batch_size={batch_size} is not divisible by the {mesh.size} devices that "
            f"share it; choose a multiple of {mesh.size} such as {above}, or use fewer devices"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a whole copy."""
    return NamedSharding(mesh, PartitionSpec())
