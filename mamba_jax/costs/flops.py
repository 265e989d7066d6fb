"""What a model computes and moves per token, part by part, from its configuration alone.

Four amounts are counted separately, because a device has a separate limit for each:

* matmul FLOPs: 2·m·n·k of every matrix product. *Model FLOPs* are those of the forward and, for
  training, its gradient (twice the forward). They measure utilisation (MFU), so they exclude
  whatever an implementation adds. *Hardware FLOPs* (HFU) add what is recomputed in the backward:
  the attention scores, and the layers under a remat policy.
* elementwise FLOPs: additions, products, comparisons. A backward has twice those of the forward
  unless said otherwise.
* special operations: exp, log, sin, rsqrt, reciprocal. softplus is two (exp, log), a sigmoid or
  silu is two (exp, reciprocal). A backward recomputes them.
* bytes: every operation reads its inputs and writes its outputs once; a backward reads the inputs
  and the output's gradient, and writes the inputs' gradients. Values between matrix products are
  of the matmul dtype; the residual stream, Δ and the recursion's state are float32. Logits, scores
  and scan states never leave the chip, except one scan state per ``STATE_TOKENS``, kept for the
  backward. Weights are read once per microbatch and pass in the matmul dtype, and their gradients
  are written once in float32.

Not counted: masked scores that a block computes for nothing, dropout, casts, communication between
devices. Rows are taken as one document each; with more, the attention sees fewer keys.

Legend: d d_model, e d_inner, n d_state, r dt_rank, k conv width, h heads, p head size,
v vocabulary (padded), a bytes of a number of the matmul dtype.
"""

import dataclasses

from mamba_jax.config import ModelConfig, RunConfig
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.costs.work import Amount, Part, Work

_SCAN = "selective_scan"
# Tokens from one kept scan state to the next, as in a fused kernel's chunk.
STATE_TOKENS = 64
_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model is trained: what its costs per token depend on besides its structure."""

    seq_len: int
    batch_size: int  # sequences of a microbatch, over all devices
    accumulation_steps: int = 1
    devices: int = 1
    fsdp: int = 1  # devices that share one copy of the optimizer's state
    dtype: str = "bfloat16"  # of matmuls
    remat: str = "full"  # "none", "dots" or "full"

    @property
    def dtype_bytes(self) -> int:
        return {"bfloat16": 2, "float32": 4}[self.dtype]

    @property
    def pass_tokens(self) -> float:
        """Tokens of a device for which it reads the weights once."""
        return self.seq_len * self.batch_size / self.devices


def setting_of(run: RunConfig, *, devices: int, on_cpu: bool) -> Setting:
    """Returns how a run trains, with "auto" resolved as on a CPU or on an accelerator."""
    auto_dtype, auto_remat = ("float32", "dots") if on_cpu else ("bfloat16", "full")
    return Setting(
        seq_len=run.model.max_seq_len,
        batch_size=run.vram.batch_size,
        accumulation_steps=run.vram.accumulation_steps,
        devices=devices,
        fsdp=run.parallel.fsdp,
        dtype=auto_dtype if run.model.dtype == "auto" else run.model.dtype,
        remat=auto_remat if run.model.remat == "auto" else run.model.remat,
    )


def model_flops(config: ModelConfig, seq_len: int) -> Amount:
    """Returns the model FLOPs per trained token, those that MFU counts."""
    setting = Setting(seq_len, batch_size=1)
    return sum(part.training.matmul_flops for part in parts(config, setting))


def parts(config: ModelConfig, setting: Setting) -> list[Part]:
    """Counts the costs of a model, all layers together, in the order of its data flow.

    Args:
      config: with its ``vocab_size`` set.
      setting: see there.

    Returns:
      Amounts per token. The parts that a config does not have are absent.
    """
    layers: dict[str, Part] = {}
    for own, count in config.layer_counts:
        layer = [_norm(own, setting), *_mixer(own, setting)]
        if own.family == "hybrid":
            layer += _hybrid(own, setting)
        for part in layer:
            made = _remade(part, own, setting) * count
            layers[part.name] = layers[part.name] + made if part.name in layers else made
    ends = [*_head(config, setting), _optimizer(config, setting)]
    return [_embed(config, setting), *layers.values(), *ends]


def _operation(
    name: str,
    setting: Setting,
    *,
    macs: Amount = 0,
    weights: Amount = 0,
    elementwise: Amount = 0,
    special: Amount = 0,
    reads: Amount = 0,
    writes: Amount = 0,
) -> Part:
    """Applies the module's rules to one operation.

    Args:
      name: of the part.
      setting: of the run.
      macs: multiply-adds of matrix products per token.
      weights: numbers in its weights, read once per microbatch.
      elementwise: FLOPs per token of the forward.
      special: operations per token of the forward.
      reads: bytes of inputs per token.
      writes: bytes of outputs per token.
    """
    weight_reads = weights * setting.dtype_bytes / setting.pass_tokens
    weight_gradients = weights * _FLOAT32_BYTES / setting.pass_tokens
    forward = Work(2 * macs, elementwise, special, weight_reads, reads + writes)
    backward = Work(
        matmul_flops=4 * macs,
        elementwise_flops=2 * elementwise,
        special_ops=special,
        weight_bytes=weight_reads + weight_gradients,
        activation_bytes=2 * reads + writes,
    )
    return Part(name, forward, backward)


def _remade(part: Part, config: ModelConfig, setting: Setting) -> Part:
    """Adds what the remat policy recomputes of a layer's part."""
    if setting.remat == "none":
        return part
    again = part.forward
    if setting.remat == "full":
        spared = _unneeded_macs(config).get(part.name, 0)
        again = dataclasses.replace(again, matmul_flops=again.matmul_flops - 2 * spared)
    elif part.name == _SCAN:
        return part  # "dots" keeps the scan's results too
    elif not part.name.startswith("scores"):
        # "dots" keeps the results of products without a batch dimension: all but the scores.
        again = dataclasses.replace(again, matmul_flops=0.0, weight_bytes=0.0)
    return dataclasses.replace(part, recomputed=part.recomputed + again)


def _unneeded_macs(config: ModelConfig) -> dict[str, int]:
    """Returns, by part, the last product of a layer if it is only added to the residual stream.

    No backward needs its result, so that XLA does not recompute it. What the recursion adds is
    still recomputed, because its steps are one loop.
    """
    hybrid = config.family == "hybrid"
    if hybrid and config.fusion == "residual_zero":
        return {"fusion": 2 * config.d_model**2}
    if hybrid and config.fusion != "sum":
        return {}
    if hybrid and config.attention_scales:
        inside = config.recursion_depth > 0 and config.recursion_reads_attention
        return {} if inside else {"q, k, v, o": config.d_model**2}
    if hybrid and config.recursion_depth > 0:
        return {}
    return {"out_proj": config.d_inner * config.d_model}


def _embed(config: ModelConfig, setting: Setting) -> Part:
    row = config.d_model * _FLOAT32_BYTES
    table = config.padded_vocab_size * row / setting.pass_tokens
    # The gradient is a table of zeros, to the rows of which the tokens' gradients are added.
    return Part(
        "embed",
        Work(activation_bytes=2 * row),
        Work(elementwise_flops=config.d_model, weight_bytes=table, activation_bytes=3 * row),
    )


def _norm(config: ModelConfig, setting: Setting) -> Part:
    """The layer's norm and the addition to the residual stream, as one operation."""
    d, a = config.d_model, setting.dtype_bytes
    return _operation(
        "norm",
        setting,
        weights=d,
        elementwise=4 * d + d,  # square, sum, two products; the addition
        special=1,
        reads=(4 + a) * d,
        writes=(4 + a) * d,
    )


def _mixer(config: ModelConfig, setting: Setting) -> list[Part]:
    d, e, n = config.d_model, config.d_inner, config.d_state
    r, k, a = config.resolved_dt_rank, config.d_conv, setting.dtype_bytes
    return [
        _operation(
            "in_proj", setting, macs=2 * d * e, weights=2 * d * e, reads=a * d, writes=2 * a * e
        ),
        _operation(
            "conv1d",
            setting,
            weights=(k + 1) * e,
            elementwise=(2 * k + 1) * e,  # taps and bias; silu's product
            special=2 * e,
            reads=a * e,
            writes=a * e,
        ),
        _operation(
            "x_proj, dt_proj",
            setting,
            macs=(r + 2 * n) * e + r * e,
            weights=(r + 2 * n) * e + r * e,
            reads=a * (e + r),
            writes=a * (r + 2 * n) + _FLOAT32_BYTES * e,
        ),
        _scan(config, setting),
        # Fused into the scan: x and y are there already, z comes in.
        _operation(
            "D, gate", setting, weights=e, elementwise=4 * e, special=2 * e, reads=a * e, writes=0
        ),
        _operation("out_proj", setting, macs=e * d, weights=e * d, reads=a * e, writes=a * d),
    ]


def _scan(config: ModelConfig, setting: Setting) -> Part:
    """The recurrence with Δ's softplus, counted per channel and token.

    Forward: for each of n states dt·A, its exp, decay·h + (dt x)·B and the sum with C make 6
    elementwise FLOPs and one exp; bias, softplus and dt·x another 4, and 2 special operations.

    Backward, per state: the states recomputed (4), then the gradients by C (2), by the state (3)
    and through the decay (1), by dt·x (2), B (2), the exponent (1), A (2) and dt (2): 19. Special
    operations are those of the fused adjoint: the exps once more, softplus and its derivative (7).

    Signed eigenvalues add 2 per state forward, and backward these once more and 1 for the gradient
    by the exponent, which is then another product than that by the state.
    """
    e, n, a = config.d_inner, config.d_state, setting.dtype_bytes
    signed = config.eigenvalues == "signed"
    part = _operation(
        _SCAN,
        setting,
        weights=e * n + e,
        elementwise=((6 + 2 * signed) * n + 4) * e,
        special=(n + 2) * e,
        reads=(a + _FLOAT32_BYTES) * e + 2 * a * n,
        writes=a * e,
    )
    kept = Work(activation_bytes=_FLOAT32_BYTES * e * n / STATE_TOKENS)
    backward = dataclasses.replace(
        part.backward, elementwise_flops=((19 + 3 * signed) * n + 8) * e, special_ops=(n + 7) * e
    )
    return Part(part.name, part.forward + kept, backward + kept)


def _hybrid(config: ModelConfig, setting: Setting) -> list[Part]:
    made = []
    recursive = config.recursion_depth > 0
    if recursive:
        made.append(_recursion(config, setting) * config.recursion_depth)
    if config.attention_scales:
        reads = config.recursion_depth if recursive and config.recursion_reads_attention else 1
        made.append(_attention_projections(config, setting, reads))
        made += [_scores(config, setting, scale) * reads for scale in config.attention_scales]
    return [*made, _fusion(config, setting)]


def _recursion(config: ModelConfig, setting: Setting) -> Part:
    """One step: norm, up, silu, down, the depth gate and the update of the float32 state."""
    d, hidden, a = config.d_model, config.recursion_expand * config.d_model, setting.dtype_bytes
    by_token, embeds = config.gate == "token", config.pass_embedding
    return _operation(
        "recursion",
        setting,
        macs=2 * d * hidden + d * by_token,
        weights=2 * d * hidden + 2 * d + d * embeds,
        # Norm, the step's vector, the gate's norm, silu, update.
        elementwise=4 * d + d * embeds + 3 * d * by_token + hidden + 3 * d,
        special=1 + 3 * by_token + 2 * hidden,  # the gate's norm and sigmoid
        reads=(4 + a + a) * d + 4 * d + a * hidden,
        writes=(4 + a + a) * d + a * hidden,
    )


def _attention_projections(config: ModelConfig, setting: Setting, reads: int) -> Part:
    """Keys and values once a layer, queries and outputs once a read, with norms, RoPE, pooling."""
    d, h, p, a = config.d_model, config.n_heads, config.head_size, setting.dtype_bytes
    scales = config.attention_scales
    pooled = sum(1 / scale for scale in scales)  # keys per token
    memory = _operation(
        "q, k, v, o",
        setting,
        macs=2 * d * d,
        weights=2 * d * d + d + p,
        # Norm; sums over the scale's tokens; norm of keys and their rotation.
        elementwise=4 * d + sum(2 * scale * d for scale in scales if scale > 1) + 7 * d * pooled,
        special=1 + (h + p) * pooled,
        reads=(4 + a) * d + 2 * 4 * d * len(scales),
        writes=a * d + 2 * 4 * d + 2 * a * d * pooled,
    )
    read = _operation(
        "q, k, v, o",
        setting,
        macs=2 * d * d,
        weights=2 * d * d + d + p,
        elementwise=4 * d + 4 * d + (3 + 2) * d * len(scales),  # norms; rotation, mixture
        special=1 + h + p * len(scales),
        reads=(4 + a) * d + (4 + a) * d * len(scales) + a * d,
        writes=(a + 4) * d + a * d * len(scales) + 2 * a * d,
    )
    again = read * reads
    return Part(memory.name, memory.forward + again.forward, memory.backward + again.backward)


def mean_keys(seq_len: int, window: int, scale: int) -> float:
    """Returns how many keys a query of a scale reads, on average over a row of one document.

    The mean of min(window, (t + 1) // scale) over t < seq_len: the j-th key counts for every query
    from t + 1 = scale·j on.
    """
    most = min(window, seq_len // scale)
    return (most * (seq_len + 1) - scale * most * (most + 1) / 2) / seq_len


def _scores(config: ModelConfig, setting: Setting, scale: int) -> Part:
    """One read of one scale: scores, softmax and the weighted sum of values.

    The backward recomputes the scores and their softmax, as every form of linear memory does.
    """
    d, h, a = config.d_model, config.n_heads, setting.dtype_bytes
    keys = mean_keys(setting.seq_len, config.resolved_attention_window, scale)
    part = _operation(
        f"scores, scale {scale}",
        setting,
        macs=2 * d * keys,
        elementwise=6 * h * keys,  # scaling, mask, maximum, difference, sum, division
        special=h * keys + h,
        reads=a * d + 2 * a * d / scale,
        writes=a * d,
    )
    again = Work(part.forward.matmul_flops / 2, part.forward.elementwise_flops)
    return dataclasses.replace(part, recomputed=again)


def _fusion(config: ModelConfig, setting: Setting) -> Part:
    d, a = config.d_model, setting.dtype_bytes
    if config.fusion == "sum":
        return _operation("fusion", setting, elementwise=d, reads=8 * d, writes=4 * d)
    norm = config.fusion != "residual_zero"
    return _operation(
        "fusion",
        setting,
        macs=2 * d * d,
        weights=2 * d * d + d * norm,
        elementwise=(4 * d if norm else d) + 2 * d,  # norm or another addition; s - h, addition
        special=int(norm),
        reads=8 * d + 2 * a * d + (4 + a) * d,  # m and r, both as one, h and the product
        writes=2 * a * d + a * d + 4 * d,
    )


def _head(config: ModelConfig, setting: Setting) -> list[Part]:
    d, v = config.d_model, config.padded_vocab_size
    norm = _operation(
        "norm_f", setting, weights=d, elementwise=4 * d, special=1, reads=4 * d, writes=4 * d
    )
    head = _operation(
        "head, loss",
        setting,
        macs=v * d,
        weights=v * d,
        elementwise=3 * v,  # maximum, difference, sum
        special=v + 1,
        reads=4 * d,
        writes=_FLOAT32_BYTES,
    )
    return [norm, head]


def _optimizer(config: ModelConfig, setting: Setting) -> Part:
    """AdamW with clipping, once a step; and the sum of gradients, once a microbatch.

    Per parameter: the norm reads the gradient (2 FLOPs); the update reads parameter, gradient and
    two moments and writes all but the gradient (16 FLOPs, a square root and a division). A sum over
    microbatches reads both and writes one.
    """
    count = parameter_count(config).total
    step_tokens = setting.pass_tokens * setting.accumulation_steps
    sums = setting.accumulation_steps if setting.accumulation_steps > 1 else 0
    own = count / setting.fsdp  # of one device
    update = Work(
        elementwise_flops=18 * own,
        special_ops=2 * own,
        weight_bytes=(1 + 7) * _FLOAT32_BYTES * own,
    )
    sum_ = Work(elementwise_flops=own, weight_bytes=3 * _FLOAT32_BYTES * own)
    return Part("optimizer", Work(), (update + sum_ * sums) * (1 / step_tokens))
