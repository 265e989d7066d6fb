"""What the C library does with freed memory, where the CPU is the device that computes.

XLA's CPU backend takes a program's temporary memory from malloc at every call and frees it after.
glibc returns such large pieces to the system, which then has to find, clear and map each page anew
at the next call: 8% of a small model's training step. Kept, they cost nothing.
"""

import ctypes
import importlib.util
import os
import sys

# From glibc's malloc.h (man 3 mallopt).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory for later calls, if JAX is to compute on the CPU.

    To be called before JAX starts its threads: a thread keeps the part of the heap that it began
    with, and only one shared by all can be kept whole. The process may in the end hold more than it
    uses at that time, never more than it did use.

    Returns:
      Whether it did: not with an accelerator, without glibc, or where the environment already says
      how malloc shall behave.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    computes_on_cpu = platforms == "cpu" or not (platforms or any(map(_installed, _ACCELERATORS)))
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or told or not computes_on_cpu:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    return all([mallopt(option, value) == 1 for option, value in settings.items()])


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
