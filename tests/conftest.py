"""Eight faked CPU devices for every test, and checked array shapes in the numerical packages.

``TEST_PLATFORM=cuda pytest -m gpu`` runs the tests marked gpu, which are skipped on a CPU.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

# Half of the suite is compilation. What one process compiles, the others and the commands that
# tests start load; the first process makes the folder, and workers inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# XLA's newer code generator for CPUs takes twice as long, and jax 0.12 has no other. It is tested
# there, and in the commands that tests start with XLA_FLAGS empty.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()

import jax
import pytest
from jaxtyping import install_import_hook

# Background jobs of a shell ignore Ctrl-C, and so would the programs that tests start and stop
# with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the backend starts: sharding is tested on the devices that a pod would have.
jax.config.update("jax_num_cpu_devices", 8)
install_import_hook(["mamba_jax.ops", "mamba_jax.models"], "beartype.beartype")

_MAPS = pathlib.Path("/proc/self/maps")  # Linux
_MOST_MAPS = 30_000  # about half of what Linux allows a process (vm.max_map_count)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops compiled programs after a module where there are too many of them.

    Each holds some pages of its own, and XLA crashes where the kernel grants no more.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def card(monkeypatch):
    """Plans for one card with enough memory, whatever this machine has."""
    from mamba_jax.config import ParallelConfig
    from mamba_jax.costs.devices import device_named
    from mamba_jax.estimator import planning
    from mamba_jax.estimator.budget import of_device
    from mamba_jax.parallel import mesh

    one_device = mesh.make_mesh(ParallelConfig(), jax.devices()[:1])
    monkeypatch.setattr(planning, "this_machine", lambda: of_device(device_named("A100-80GB")))
    monkeypatch.setattr(mesh, "make_mesh", lambda _: one_device)
