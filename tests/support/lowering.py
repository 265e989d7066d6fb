"""Programs for devices that this machine does not have."""

import contextlib

import jax


@contextlib.contextmanager
def as_on_a_gpu():
    """Newer versions of jax ask which card a kernel is for when they lower it."""
    if jax.__version_info__ < (0, 11):
        yield
        return
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield
