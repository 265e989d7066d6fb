"""The layers of a model: a stack per kind, run in the order of the plan.

A stack is a tree whose leaves carry a leading layer axis, over the layers of one kind in the order
they occur; so it depends on the kinds alone, not on how their plan is written. Where all layers are
of one kind, its stack stands for them; otherwise a dict does, kind → stack.

Legend: l layers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.config.plan import LayerRun, Loop, numbers

Tree = Any
# A layer: (stream, its part of a stack) → (stream, what it makes).
Layer = Callable[[jax.Array, Tree], tuple[jax.Array, Tree]]


def by_kind(layers: Tree, kinds: Sequence[str]) -> dict[str, Tree]:
    """Returns kind → stack; of no layers (None), kind → None."""
    if layers is None:
        return dict.fromkeys(kinds)
    return dict(layers) if len(set(kinds)) > 1 else {kinds[0]: layers}


def joined(stacks: Mapping[str, Tree], kinds: Sequence[str]) -> Tree:
    """The inverse of ``by_kind``."""
    return dict(stacks) if len(set(kinds)) > 1 else stacks[kinds[0]]


def sorted_by_kind(of_layers: jax.Array | None, kinds: Sequence[str]) -> dict[str, Any]:
    """Returns kind → the entries of its layers, of an array over all layers; of None, None."""
    if of_layers is None or len(set(kinds)) == 1:
        return dict.fromkeys(kinds, of_layers)
    return {kind: of_layers[np.array(numbers(kind, kinds))] for kind in sorted(set(kinds))}


def places(kinds: Sequence[str]) -> list[tuple[str, int]]:
    """Returns each layer's kind and its index in that kind's stack."""
    return [(kind, kinds[:layer].count(kind)) for layer, kind in enumerate(kinds)]


def unstack(layers: Tree, kinds: Sequence[str]) -> tuple[Tree, ...]:
    """Returns each layer's own tree, in the order of the plan."""
    stacks = by_kind(layers, kinds)
    cut = lambda stack, i: jax.tree.map(lambda leaf: leaf[i], stack)
    return tuple(cut(stacks[kind], i) for kind, i in places(kinds))


def in_order(stacks: Mapping[str, jax.Array], kinds: Sequence[str]) -> jax.Array:
    """Joins arrays of some kinds' layers, (l, …) each, into one, in the order of the plan."""
    if len(stacks) == 1:
        return next(iter(stacks.values()))
    order = [layer for kind in stacks for layer in numbers(kind, kinds)]
    return jnp.concatenate(list(stacks.values()))[np.argsort(order)]


def run(
    layer: Callable[[str, bool], Layer],
    x: jax.Array,
    stacks: Mapping[str, Tree],
    schedule: Sequence[LayerRun | Loop],
    *,
    looped: bool = False,
) -> tuple[jax.Array, dict[str, Tree]]:
    """Runs layers, each run of equal ones and a repeated part as a loop.

    Args:
      layer: makes a layer from its kind and whether it is inside a loop.
      x: the stream.
      stacks: kind → what the layers of that kind take.
      schedule: as ``config.plan.schedule`` makes it.
      looped: whether this is the body of a loop.

    Returns:
      The stream, and kind → what those layers made, stacked.
    """
    pieces = {
        kind: _split(stack, [_count(node, kind) for node in schedule])
        for kind, stack in stacks.items()
    }
    made: dict[str, list[Tree]] = {kind: [] for kind in stacks}
    for index, node in enumerate(schedule):
        own = {kind: cut[index] for kind, cut in pieces.items() if _count(node, kind)}
        if isinstance(node, Loop):
            body = functools.partial(run, layer, schedule=node.body, looped=True)
            fold = lambda leaf, n=node.times: leaf.reshape(n, leaf.shape[0] // n, *leaf.shape[1:])
            flat = lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
            x, results = jax.lax.scan(body, x, jax.tree.map(fold, own))
            results = jax.tree.map(flat, results)
        elif node.length > 1 or (len(schedule) == 1 and not looped):
            x, result = jax.lax.scan(layer(node.kind, True), x, own[node.kind])
            results = {node.kind: result}
        else:
            one = jax.tree.map(lambda leaf: leaf[0], own[node.kind])
            x, result = layer(node.kind, looped)(x, one)
            results = {node.kind: jax.tree.map(lambda leaf: leaf[None], result)}
        for kind, result in results.items():
            made[kind].append(result)
    return x, {kind: _concatenated(parts) for kind, parts in made.items()}


def _count(node: LayerRun | Loop, kind: str) -> int:
    """Returns how many layers of a kind a part of a schedule has."""
    if isinstance(node, LayerRun):
        return node.length if node.kind == kind else 0
    return node.times * sum(_count(run, kind) for run in node.body)


def _split(stack: Tree, counts: Sequence[int]) -> list[Tree]:
    """Cuts a stack into consecutive parts; of a single one nothing is cut."""
    leaves, structure = jax.tree.flatten(stack)
    if sum(count > 0 for count in counts) == 1:
        return [stack if count else None for count in counts]
    # Not by indices: their gradients would be padded and added.
    cut = [jax.lax.split(leaf, counts) for leaf in leaves]
    return [jax.tree.unflatten(structure, parts) for parts in zip(*cut, strict=True)]


def _concatenated(parts: Sequence[Tree]) -> Tree:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
