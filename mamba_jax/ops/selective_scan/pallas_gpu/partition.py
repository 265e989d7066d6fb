"""Rows on several devices: each device runs the kernels on its own rows.

XLA cannot look into a kernel, so it would gather the whole batch on every device. The rule here
allows it to divide the leading axis of each array that has rows, and no other axis.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Arrays

# The inputs that every row shares; all others, and all outputs, have the rows on their first axis.
SHARED = ("A", "D", "dt_bias")


def by_rows(function: Callable[[Arrays], Arrays], inputs: Arrays, key: str) -> Arrays:
    """Returns ``function(inputs)``, computed on the devices that hold the rows.

    Args:
      function: works on any number of rows, each for itself.
      inputs: arrays with the rows on the first axis, but for ``SHARED``.
      key: everything that ``function`` depends on besides its inputs and the code of this folder.
        Compiled programs are cached by their text, which does not include what ``function`` does:
        the key, in a name, represents it (see ``parallel/compile_cache.py``, which leaves out the
        address).
    """
    # Skipped if there is nothing to divide: newer versions of jax refuse the rest under an abstract
    # mesh, with which a program for another machine is lowered.
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() == 1 or (not mesh.empty and mesh.size == 1):
        return function(inputs)
    names = tuple(inputs)
    results = jax.eval_shape(function, inputs)

    @custom_partitioning
    def run(*arrays):
        values = function(dict(zip(names, arrays, strict=True)))
        return tuple(values[name] for name in results)

    def partition(mesh, argument_shapes, result_shapes):
        rows = argument_shapes[names.index("x")].sharding.spec[0]
        divided = lambda name: None if name in SHARED else rows
        place = lambda axis: NamedSharding(mesh, PartitionSpec(axis))
        return (
            mesh,
            lambda *arrays: run.fun(*arrays),
            tuple(place(rows) for _ in result_shapes),
            tuple(place(divided(name)) for name in names),
        )

    rule, others = _sharding_rule(inputs, results)
    run.def_partition(
        partition,
        # For the older of XLA's two partitioners, which asks this instead of reading the rule.
        infer_sharding_from_operands=functools.partial(_infer, names.index("x")),
        sharding_rule=rule,
        need_replication_factors=others,
    )

    def named(*arrays):
        return run(*arrays)

    named.__name__ = f"selective_scan_{hashlib.sha256(_code() + key.encode()).hexdigest()[:16]}"
    return dict(zip(results, jax.jit(named)(*inputs.values()), strict=True))


@functools.cache
def _code() -> bytes:
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def _infer(x_index: int, mesh, argument_shapes, result_shapes):
    rows = argument_shapes[x_index].sharding.spec[0]
    return tuple(NamedSharding(mesh, PartitionSpec(rows)) for _ in result_shapes)


def _sharding_rule(
    inputs: Arrays, results: dict[str, jax.ShapeDtypeStruct]
) -> tuple[str, tuple[str, ...]]:
    """Returns the rule in einsum-like notation, and the factors that may not be divided."""
    others = []

    def axes(shared: bool, ndim: int) -> str:
        names = [] if shared else ["rows"]
        while len(names) < ndim:
            others.append(f"axis{len(others)}")
            names.append(others[-1])
        return " ".join(names)

    operands = [axes(name in SHARED, value.ndim) for name, value in inputs.items()]
    outputs = [axes(False, value.ndim) for value in results.values()]
    return f"{', '.join(operands)} -> {', '.join(outputs)}", tuple(others)
