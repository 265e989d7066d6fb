"""One table: the path of a parameter → how it is divided over the mesh.

Legend: l layers, d d_model, e d_inner, r dt_rank, n d_state, k conv width or recursion step,
h heads, p head size, v vocabulary.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba_jax.parallel.mesh import FSDP

# The first pattern that ends a path decides; names before it (``opt_state/…/mu/…``) do not matter,
# so the moments of a parameter are sharded as it is. Matrices are divided on their d_model axis, or
# d_inner where they have none; never on the layer axis, whose length divides least often and which
# the scan over layers would have to gather. Vectors, and arrays no larger than a few of them, are
# not worth the communication.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", PartitionSpec(None, FSDP)),  # (v, d)
    (r"lm_head/kernel", PartitionSpec(None, FSDP)),  # (v, d)
    (r"in_proj/kernel", PartitionSpec(None, FSDP, None, None)),  # (l, d, 2, e)
    (r"conv1d/kernel", PartitionSpec(None, None, FSDP)),  # (l, k, e)
    (r"x_proj/kernel", PartitionSpec(None, FSDP, None)),  # (l, e, r+2n)
    (r"dt_proj/kernel", PartitionSpec(None, None, FSDP)),  # (l, r, e)
    (r"out_proj/kernel", PartitionSpec(None, None, FSDP)),  # (l, e, d)
    (r"up/kernel", PartitionSpec(None, FSDP, None)),  # (l, d, 2d)
    (r"down/kernel", PartitionSpec(None, None, FSDP)),  # (l, 2d, d)
    (r"gate/kernel", PartitionSpec()),  # (l, k, d)
    (r"qkv/kernel", PartitionSpec(None, FSDP, None, None, None)),  # (l, d, 3, h, p)
    (r"o_proj/kernel", PartitionSpec(None, None, None, FSDP)),  # (l, h, p, d)
    (r"fusion/proj/kernel", PartitionSpec(None, None, FSDP)),  # (l, 2d, d)
    (r"scale|bias|A_log|D|scale_logits|pass_embedding", PartitionSpec()),
)


def spec_for(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Returns the spec of one array.

    Where ``fsdp`` does not divide the axis that the table names, the next axis takes its place, in
    the order after it, then before it, the layer axis excepted; where none divides, the array is
    replicated. So every size works on every mesh, at worst with more memory.

    Args:
      path: names joined by "/", e.g. ``params/layers/mixer/in_proj/kernel``.
      shape: the array's shape.
      fsdp: devices along the fsdp axis.

    Raises:
      ValueError: if no rule knows the path: a new parameter must be entered in the table.
    """
    if not shape:
        return PartitionSpec()
    rule = next((spec for name, spec in RULES if re.search(rf"(^|/)({name})$", path)), None)
    if rule is None:
        raise ValueError(f"no sharding rule for {path} of shape {shape}; enter it in RULES")
    if FSDP not in rule:
        return PartitionSpec()
    wanted = rule.index(FSDP)
    first = 1 if re.search(r"(^|/)layers/", path) else 0
    for axis in (*range(wanted, len(shape)), *range(first, wanted)):
        if shape[axis] % fsdp == 0:
            return PartitionSpec(*(FSDP if i == axis else None for i in range(len(shape))))
    return PartitionSpec()


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree's shardings; works on parameters and on whole training states.

    Args:
      tree: arrays or ``jax.ShapeDtypeStruct``s. Scalars are replicated.
      mesh: with an axis ``fsdp``.

    Raises:
      ValueError: if the table has no rule for a path.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh.shape[FSDP]))

    return jax.tree_util.tree_map_with_path(sharding, tree)
