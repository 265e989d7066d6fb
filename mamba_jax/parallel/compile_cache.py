"""Where compiled programs are kept between runs."""

import os
import pathlib

import jax


def cache_compilations(cache_root: pathlib.Path) -> None:
    """Keeps compiled programs on the disk, unless the environment sets where or disables it."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root / "compiled"))
    # Otherwise a program for several GPUs is never found again: the scan's part of it, created when
    # XLA partitions the program, contains an address. Its name identifies such parts.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
