"""The parts of a layer as nodes of an ONNX graph: norms, the mixer, the recursion, the fusion.

Each is the maths of its namesake in ``modules``, in float32. Weights have the names of
``tensors.LAYER``.

Legend: b batch, t time, d d_model, e d_inner, n d_state, r dt_rank, k conv width, o outputs.
"""

from collections.abc import Callable

import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.exporting.onnx_graph import Graph

F = np.float32
END = np.array([2**62])  # a slice's, as far as there is anything


def at(*numbers: int) -> np.ndarray:
    """Returns int64 axes, sizes or places."""
    return np.array(numbers, np.int64)


def normalise(g: Graph, x: str, eps: float) -> str:
    """Divides the last axis by its root mean square."""
    mean = g("ReduceMean", g("Mul", x, x), at(-1), keepdims=1)
    return g("Div", x, g("Sqrt", g("Add", mean, F(eps))))


def norm(g: Graph, x: str, scale: str, eps: float) -> str:
    """``normalise`` times the learned scale of this name."""
    return g("Mul", normalise(g, x, eps), g.weight(scale))


def silu(g: Graph, x: str) -> str:
    return g("Mul", x, g("Sigmoid", x))


def mixer(
    g: Graph, config: ModelConfig, layer: str, x: str, past: dict[str, str], one_token: bool
) -> tuple[str, dict[str, str]]:
    """The Mamba mixer of ``norm(x)``.

    Args:
      g: the graph to add to.
      config: of the model.
      layer: the prefix of its weights' names.
      x: the stream (b, t, d).
      past: ``conv_state`` (b, k - 1, e) and ``ssm_state`` (b, e, n) before the row.
      one_token: t is 1: no loop.

    Returns:
      (b, t, d), and the states after the row.
    """
    mixer = f"{layer}mixer."
    n, r = config.d_state, config.resolved_dt_rank
    u = norm(g, x, f"{layer}norm.weight", config.norm_eps)
    both = g("MatMul", u, g.factor(f"{mixer}in_proj.weight"))
    x, z = g("Split", both, outs=2, axis=2, num_outputs=2)
    joined = g("Concat", past["conv_state"], x, axis=1)
    conv_state = g("Slice", joined, g("Shape", x, start=1, end=2), END, at(1))
    convolved = g(
        "Conv",
        g("Transpose", joined, perm=[0, 2, 1]),
        g.weight(f"{mixer}conv1d.weight"),
        g.weight(f"{mixer}conv1d.bias"),
        group=config.d_inner,
    )
    x = silu(g, g("Transpose", convolved, perm=[0, 2, 1]))
    selected = g("MatMul", x, g.factor(f"{mixer}x_proj.weight"))
    dt, B, C = g("Split", selected, at(r, n, n), outs=3, axis=2)
    dt = g("MatMul", dt, g.factor(f"{mixer}dt_proj.weight"))
    dt = g("Softplus", g("Add", dt, g.weight(f"{mixer}dt_proj.bias")))
    A = g("Neg", g("Exp", g.weight(f"{mixer}A_log")))

    def step(g: Graph, state: str, items: list[str]) -> tuple[str, str]:
        dt, input_, B, C = items  # (b, e, 1) twice, (b, 1, n), (b, n, 1)
        decay = g("Exp", g("Mul", dt, A))
        if config.eigenvalues == "signed":
            decay = g("Sub", g("Mul", decay, F(2)), F(1))
        state = g("Add", g("Mul", decay, state), g("Mul", input_, B))
        return state, g("MatMul", state, C)

    # With the axes that the step's factors lack: a body without them is shorter.
    items = [(dt, 3), (g("Mul", dt, x), 3), (B, 2), (C, 3)]
    items = [g("Unsqueeze", value, at(axis)) for value, axis in items]
    if one_token:
        items = [g("Squeeze", value, at(1)) for value in items]
        ssm_state, y = step(g, past["ssm_state"], items)
        y = g("Unsqueeze", y, at(1))
    else:
        ssm_state, y = g.scan(step, past["ssm_state"], items, axis=1)
    y = g("Add", g("Squeeze", y, at(3)), g("Mul", x, g.weight(f"{mixer}D")))
    out = g("MatMul", g("Mul", y, silu(g, z)), g.factor(f"{mixer}out_proj.weight"))
    return out, {"conv_state": conv_state, "ssm_state": ssm_state}


def recursion(
    g: Graph, config: ModelConfig, layer: str, h: str, read: Callable[[Graph, str], str] | None
) -> str:
    """Runs the recursion's steps from h (b, t, d), in a loop over one body.

    Args:
      g: the graph to add to.
      config: of the model.
      layer: the prefix of its weights' names.
      h: the stream.
      read: adds what attention reads for a stream; None: nothing.
    """
    part, eps, by_token = f"{layer}recursion.", config.norm_eps, config.gate == "token"

    def step(g: Graph, s: str, rows: list[str]) -> tuple[str]:
        unit = normalise(g, s, eps)
        if by_token:
            weight, bias, *rows = rows
            factor = g("MatMul", unit, g("Unsqueeze", weight, at(1)))
            factor = g("Sigmoid", g("Add", factor, bias))
        else:
            factor, *rows = rows
        input_ = g("Mul", unit, g.weight(f"{part}norm.weight"))
        for embedding in rows:
            input_ = g("Add", input_, embedding)
        hidden = silu(g, g("MatMul", input_, g.factor(f"{part}up.weight")))
        change = g("MatMul", hidden, g.factor(f"{part}down.weight"))
        if read is not None:
            change = g("Add", change, read(g, s))
        return (g("Add", s, g("Mul", factor, change)),)

    names = [f"{part}gate.{name}" for name in (("weight", "bias") if by_token else ("scale",))]
    rows = [g.weight(name) for name in names]
    if config.shared_gate:
        sizes = [at(config.recursion_depth, *g.table[name].shape[1:]) for name in names]
        rows = [g("Expand", row, size) for row, size in zip(rows, sizes, strict=True)]
    if config.pass_embedding:
        rows.append(g.weight(f"{part}pass_embedding"))
    (s,) = g.scan(step, h, rows, axis=0)
    return s


def fusion(g: Graph, config: ModelConfig, layer: str, h: str, m: str, r: str) -> str:
    """Fuses the stream h, the mixer's part m and the recursion's r, each (b, t, d)."""
    if config.fusion == "sum":
        return g("Add", h, r)
    both = g("Concat", m, r, axis=2)
    fused = g("MatMul", both, g.factor(f"{layer}fusion.proj.weight"))
    if config.fusion == "residual_zero":
        return g("Sum", h, r, fused)
    fused = norm(g, fused, f"{layer}fusion.norm.weight", config.norm_eps)
    return g("Add", h, fused) if config.fusion == "residual_norm" else fused
