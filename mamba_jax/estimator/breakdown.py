"""What a train step needs on one device, part by part, by formula.

A step's memory peaks at one of two places: the loss, where all kept
activations exist and a chunk's logits come on top; and the backward of a layer, where that layer's
values, its gradients' buffers and the gradients of all layers come on top. The counts below are of
the buffers that XLA (jax 0.10) has alive there in the compiled step on an NVIDIA card; the larger
ones were found in its buffer assignment by name and shape. It omits small arrays and the gaps
between buffers: a few percent (``benchmarks/results/estimator_rtx4080.md``).

Legend, of one layer and token: d d_model, e d_inner, n d_state, r dt_rank, k conv width; f bytes of
a float32, a of a number of the matmul dtype; v vocabulary (padded).
"""

import dataclasses

from mamba_jax.config import ModelConfig
from mamba_jax.config.plan import Loop, schedule
from mamba_jax.costs.flops import Setting
from mamba_jax.costs.parameters import layer_parameters, parameter_count

_F = 4
# For the fused scan: tokens from one kept state to the next, channels of a program (each makes its
# own sums of dB and dC), tokens whose states are in registers together.
_CHUNK_TOKENS, _BLOCK_CHANNELS, _GROUP_TOKENS = 32, 32, 2
_SCHEDULER_WARPS = 1_056  # warps up to which the backward scan splits a sequence


@dataclasses.dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by part at the moment that needs most."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


def memory_breakdown(model: ModelConfig, setting: Setting, *, chunk_tokens: int) -> MemoryBreakdown:
    """Returns the bytes of each part of a step.

    Args:
      model: with its ``vocab_size`` set.
      setting: how it is trained.
      chunk_tokens: tokens whose logits are made at a time.
    """
    rows = -(-setting.batch_size // setting.devices)
    tokens = rows * setting.seq_len
    count = parameter_count(model).total
    layers = sum(n * layer_parameters(layer) for layer, n in model.layer_counts)
    d, v, a = model.d_model, model.padded_vocab_size, setting.dtype_bytes

    sums = _F * count // setting.fsdp if setting.accumulation_steps > 1 else 0
    gathered = _F * count if setting.fsdp > 1 else 0
    chunk = -(-tokens // -(-tokens // chunk_tokens))
    # The gradient of the head is summed over chunks; with one chunk it is made last, and the
    # gradient of the logits waits for it.
    is_whole = chunk == tokens
    head = 0 if is_whole else _F * v * d
    waiting = a * chunk * v if is_whole else 0
    kept = tokens * (kept_bytes(model, setting) + _masks(model, setting))
    if setting.remat == "none" and a < _F:
        kept += a * layers  # the weights in the matmul dtype, for the backward

    logits = (_F + a) * chunk * v  # and their gradients
    loss = 2 * _F * d * tokens + a * v * d + logits
    workspace = waiting + _scratch(model, rows, setting.seq_len)
    workspace += tokens * max(_workspace(layer, setting) for layer, _ in model.layer_counts)
    workspace += tokens * _pass_bytes(model, setting)
    parts = {
        "weights": _F * count // setting.fsdp + gathered,
        "optimizer": 2 * _F * count // setting.fsdp,
        "gradients": sums + head,
        "activations": kept,
    }
    if loss > _F * layers + workspace:
        parts["loss"] = loss
    else:
        parts["gradients"] += _F * layers
        parts["workspace"] = workspace
    return MemoryBreakdown({part: round(size) for part, size in parts.items()})


def _starts(model: ModelConfig) -> float:
    """The states at chunks' starts, which the scan keeps for its backward."""
    return _F * model.d_inner * model.d_state / _CHUNK_TOKENS


def kept_bytes(model: ModelConfig, setting: Setting) -> float:
    """Bytes that the layers keep of each token from forward to backward."""
    return sum(count * _kept_bytes(layer, setting) for layer, count in model.layer_counts)


def _kept_bytes(model: ModelConfig, setting: Setting) -> float:
    """Bytes that a layer, the only kind of ``model``, keeps of each token."""
    d, e, a = model.d_model, model.d_inner, setting.dtype_bytes
    selected = a * (model.resolved_dt_rank + 2 * model.d_state)  # Δ's rank, B and C
    if setting.remat == "full":
        return _F * d  # the stream
    if setting.remat == "dots":
        # x and z, Δ, y.
        kept = _F * d + 2 * a * e + _F * e + selected + a * e + _starts(model)
        return kept + (_kept_dots_hybrid(model, a) if model.family == "hybrid" else 0)
    # The conv's taps and Δ; x, z, silu's and y's parts; the stream, its norm and both products.
    kept = (model.d_conv + 1) * _F * e + 7 * a * e + 3 * _F * d + a * d + selected
    kept += _starts(model)
    if model.dropout > 0:
        kept += (_F + 1) * d * (2 if model.family == "hybrid" else 1)
    return kept + (_kept_all_hybrid(model, a) if model.family == "hybrid" else 0)


def _pass_bytes(model: ModelConfig, setting: Setting) -> float:
    """Bytes that one pass of a plan's loop keeps of each token: they are copied, from or to those
    of all passes."""
    return sum(
        run.length * _kept_bytes(model.of_kind(run.kind), setting)
        for node in schedule(model.kinds)
        if isinstance(node, Loop)
        for run in node.body
    )


def _masks(model: ModelConfig, setting: Setting) -> int:
    """Whether each tap and channel is in the document: computed once, for all layers."""
    return model.d_conv * model.d_inner if setting.remat == "none" else 0


def _kept_dots_hybrid(model: ModelConfig, a: int) -> float:
    """Results of the hybrid's products: up, down; queries and outputs; keys, values; fusion."""
    d, hidden, steps = model.d_model, model.recursion_expand * model.d_model, model.recursion_depth
    kept = a * d + (a * d if model.fusion in ("residual_norm", "norm") else 0)
    kept += steps * (a * hidden + a * d)
    if model.attention_scales:
        kept += _reads(model) * (_F * d + a * d) + 2 * _F * d
    return kept


def _kept_all_hybrid(model: ModelConfig, a: int) -> float:
    d, scales = model.d_model, model.attention_scales
    kept = 6 * _F * d + a * d + (2 * a * d if model.fusion != "sum" else 0)
    kept += model.recursion_depth * (_step(model, a) + 4 * _F * d)
    if scales:
        kept += _reads(model) * _read(model, a)
        kept += (3 * _F + 2 * a) * d * sum(1 / scale for scale in scales)  # keys and values
    return kept


def _reads_inside(model: ModelConfig) -> bool:
    return model.recursion_reads_attention and model.recursion_depth > 0


def _reads(model: ModelConfig) -> int:
    """How often the model reads the attention."""
    return model.recursion_depth if _reads_inside(model) else 1


def _step(model: ModelConfig, a: int) -> float:
    """What the backward of a step of the recursion needs of its forward."""
    d, hidden = model.d_model, model.recursion_expand * model.d_model
    return 4 * _F * d + 4 * a * hidden + 2 * a * d


def _read(model: ModelConfig, a: int) -> float:
    """What the backward of a read of the attention needs, except scores, which are recomputed."""
    scales = len(model.attention_scales)
    return (3 + scales) * _F * model.d_model + (1 + scales) * a * model.d_model


def _workspace(model: ModelConfig, setting: Setting) -> float:
    """Bytes for each token in the backward of a layer, the only kind of ``model``."""
    d, e, a = model.d_model, model.d_inner, setting.dtype_bytes
    partial = 2 * _F * model.d_state * e / _BLOCK_CHANNELS  # dB and dC, by programs of the scan
    # The gradient of the stream; x, z, y and their gradients; Δ and its gradient.
    work = _F * d + a * d + 5 * a * e + 2 * _F * e + partial + _starts(model)
    if setting.remat == "full":
        work += a * d + 3 * a * e  # the norm, x and z, recomputed
    if model.family == "mamba":
        return work
    stream = 6 * _F * d  # of the parts of the block, and of their gradients
    steps = model.recursion_depth * _step(model, a)
    if not model.attention_scales:
        return max(work, stream + steps)
    reads = _reads(model) * _read(model, a)
    if setting.remat == "none":
        return stream + steps + reads
    bands = _bands(model, setting.seq_len)
    if not _reads_inside(model):  # its backward comes first, scale by scale, then the recursion's
        return work + stream + max(steps, reads + model.n_heads * (2 * _F + 1) * max(bands))
    # What is constant in the loop is made before it for all scales: a mask and two float32 arrays
    # of the size of the scores. The loop makes the scores and weights of one scale at a time.
    scores = model.n_heads * ((2 * _F + 1) * sum(bands) + (_F + a) * max(bands))
    return work + stream + steps + reads + scores


def _bands(model: ModelConfig, seq_len: int) -> list[int]:
    """The number of keys per scale with which a query's scores are made, masked ones included."""
    window = model.resolved_attention_window
    chunk = min(window, seq_len)
    return [
        min(window + -(-chunk // scale), -(-seq_len // scale)) for scale in model.attention_scales
    ]


def _scratch(model: ModelConfig, rows: int, seq_len: int) -> int:
    """The states that the backward scan recomputes, for all programs that run in parallel."""
    segments = 1
    warps = rows * model.d_inner // _BLOCK_CHANNELS
    while warps * segments * 2 <= _SCHEDULER_WARPS and seq_len >= 2 * segments * 128:
        segments *= 2
    groups = _CHUNK_TOKENS // _GROUP_TOKENS
    return _F * rows * segments * groups * model.d_inner * model.d_state
