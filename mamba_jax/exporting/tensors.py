"""The table of tensors: our parameters ↔ Hugging Face's, both ways.

Mamba is ``MambaForCausalLM``; the hybrid, ``assets/modeling_hybrid_mamba.py``, names its mixer's
tensors likewise.

Legend: v vocabulary, d d_model, e d_inner, n d_state, r dt_rank, k conv width or recursion steps,
h heads, p head size, s scales, l layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.config.plan import numbers
from mamba_jax.errors import UserError
from mamba_jax.models import build, stacks


class Pair(NamedTuple):
    """One tensor of a layer in both formats; our arrays have no layer axis here."""

    theirs: str  # after "backbone.layers.{i}."
    ours: tuple[str, ...]  # path in a stack
    out: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]  # up to a reshape


_same = lambda a: a
_turn = lambda a: a.T
_turn_first = lambda a: a.reshape(len(a), -1).T  # (i, …) → (…, i)
_turn_last = lambda a: a.reshape(-1, a.shape[-1]).T  # (…, i) → (i, …)
# A layer uses the pairs of the parts that its model has.
LAYER = (
    Pair("norm.weight", ("norm", "scale"), _same, _same),
    Pair("mixer.in_proj.weight", ("mixer", "in_proj", "kernel"), _turn_first, _turn),  # x then z
    # (k, e) ↔ (e, 1, k)
    Pair("mixer.conv1d.weight", ("mixer", "conv1d", "kernel"), lambda a: a.T[:, None], _turn),
    Pair("mixer.conv1d.bias", ("mixer", "conv1d", "bias"), _same, _same),
    Pair("mixer.x_proj.weight", ("mixer", "x_proj", "kernel"), _turn, _turn),
    Pair("mixer.dt_proj.weight", ("mixer", "dt_proj", "kernel"), _turn, _turn),
    Pair("mixer.dt_proj.bias", ("mixer", "dt_proj", "bias"), _same, _same),
    Pair("mixer.A_log", ("mixer", "A_log"), _same, _same),
    Pair("mixer.D", ("mixer", "D"), _same, _same),
    Pair("mixer.out_proj.weight", ("mixer", "out_proj", "kernel"), _turn, _turn),
    Pair("recursion.norm.weight", ("recursion", "norm", "scale"), _same, _same),
    Pair("recursion.up.weight", ("recursion", "up", "kernel"), _turn, _turn),
    Pair("recursion.down.weight", ("recursion", "down", "kernel"), _turn, _turn),
    Pair("recursion.gate.weight", ("recursion", "gate", "kernel"), _same, _same),
    Pair("recursion.gate.bias", ("recursion", "gate", "bias"), _same, _same),
    Pair("recursion.gate.scale", ("recursion", "gate", "scale"), _same, _same),
    Pair("recursion.pass_embedding", ("recursion", "pass_embedding"), _same, _same),
    Pair("attention.norm.weight", ("attention", "norm", "scale"), _same, _same),
    Pair(
        "attention.qkv.weight", ("attention", "qkv", "kernel"), _turn_first, _turn
    ),  # (d, 3, h, p)
    Pair("attention.query_norm.weight", ("attention", "query_norm", "scale"), _same, _same),
    Pair("attention.key_norm.weight", ("attention", "key_norm", "scale"), _same, _same),
    Pair("attention.scale_logits", ("attention", "scale_logits"), _same, _same),
    Pair("attention.o_proj.weight", ("attention", "o_proj", "kernel"), _turn_last, _turn),
    Pair("fusion.proj.weight", ("fusion", "proj", "kernel"), _turn, _turn),
    Pair("fusion.norm.weight", ("fusion", "norm", "scale"), _same, _same),
)
EMBEDDING, NORM, HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"


def to_hf(params: Mapping[str, Any], config: ModelConfig, n_ids: int) -> dict[str, np.ndarray]:
    """Returns Hugging Face's tensors, float32 and C-contiguous.

    Args:
      params: as ``models.build.init`` makes them.
      config: their structure.
      n_ids: rows of embedding and head to give out; padding rows after them stay here.
    """
    tensors = {
        EMBEDDING: np.asarray(params["embed"]["embedding"])[:n_ids],
        NORM: np.asarray(params["norm_f"]["scale"]),
    }
    if not config.tie_embeddings:
        tensors[HEAD] = np.asarray(params["lm_head"]["kernel"])[:n_ids]
    layers = stacks.by_kind(params["layers"], config.kinds)
    for kind, stack in layers.items():
        for pair in _pairs(stack):
            stacked = np.asarray(_leaf(stack, pair.ours))
            for i, array in zip(numbers(kind, config.kinds), stacked, strict=True):
                tensors[f"backbone.layers.{i}.{pair.theirs}"] = pair.out(array)
    # safetensors writes wrong values, silently, from arrays that are not C-contiguous.
    return {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}


def from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """Returns float32 parameters of ``config`` made of Hugging Face's tensors.

    Raises:
      UserError: if a tensor is missing, or one is left over, or of another shape.
    """
    last = f"backbone.layers.{config.n_layers - 1}.{LAYER[0].theirs}"
    if last not in tensors:  # before names of perhaps 10⁹ layers are made
        raise UserError(f"tensor {last} is missing; download the model again")
    kinds = config.kinds
    abstract = stacks.by_kind(build.abstract_params(config)["layers"], kinds)
    names = {EMBEDDING, NORM} | (set() if config.tie_embeddings else {HEAD})
    names |= {
        f"backbone.layers.{i}.{pair.theirs}"
        for i, kind in enumerate(kinds)
        for pair in _pairs(abstract[kind])
    }
    odd = sorted(names.symmetric_difference(tensors))
    if odd:
        what = "missing" if odd[0] in names else "not one of this architecture's"
        raise UserError(f"tensor {odd[0]} is {what}")
    made = {kind: _stack(stack, tensors, numbers(kind, kinds)) for kind, stack in abstract.items()}
    params: dict[str, Any] = {
        "embed": {"embedding": _padded(EMBEDDING, tensors, config)},
        "layers": stacks.joined(made, kinds),
        "norm_f": {
            "scale": np.asarray(_checked(NORM, tensors[NORM], (config.d_model,)), np.float32)
        },
    }
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": _padded(HEAD, tensors, config)}
    return params


def _stack(
    abstract: Mapping[str, Any], tensors: Mapping[str, np.ndarray], numbers: Sequence[int]
) -> dict[str, Any]:
    """Returns the stack of the layers of these numbers, all of one kind."""
    stack: dict[str, Any] = {}
    for pair in _pairs(abstract):
        own_shape = _leaf(abstract, pair.ours).shape[1:]
        shape = pair.out(np.broadcast_to(np.float32(0), own_shape)).shape  # takes no memory
        each = []
        for i in numbers:
            name = f"backbone.layers.{i}.{pair.theirs}"
            each.append(pair.back(_checked(name, tensors[name], shape)).reshape(own_shape))
        *groups, last = pair.ours
        node = stack
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = np.stack(each).astype(np.float32)
    return stack


def _padded(name: str, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """Adds the rows that no id has."""
    table_vd = _checked(name, tensors[name], (config.vocab_size, config.d_model))
    rows = config.padded_vocab_size - config.vocab_size
    return np.pad(np.asarray(table_vd, np.float32), ((0, rows), (0, 0)))


def _pairs(stack: Mapping[str, Any]) -> list[Pair]:
    return [pair for pair in LAYER if _leaf(stack, pair.ours) is not None]


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Returns what is at a path; None: nothing."""
    node: Any = tree
    for name in path:
        if name not in node:
            return None
        node = node[name]
    return node


def _checked(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape:
        raise UserError(f"tensor {name} has shape {array.shape}; config.json requires {shape}")
    return array
