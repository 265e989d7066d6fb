"""The fields that define the structure of a model, and what follows from them."""

import dataclasses
from typing import Annotated, Any, Literal

from mamba_jax.config import plan as plans
from mamba_jax.config.fields import FRACTION, NOT_NEGATIVE, POSITIVE

_TABLE_ROWS = 64  # the tiles of tensor cores and of TPUs' matrix units divide it


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The structure of a model. Both families share it; fields that only the hybrid uses say so."""

    family: Annotated[
        Literal["mamba", "hybrid"],
        "Plain Mamba, or Hybrid Recursive Mamba.",
    ] = "mamba"
    d_model: Annotated[int, POSITIVE, "Width of the residual stream."] = 768
    n_layers: Annotated[int, POSITIVE, "Number of layers."] = 12
    plan: Annotated[
        str,
        "Hybrid: the kind of each layer: M Mamba, A Mamba with an attention read, H hybrid; a "
        "number after * repeats a layer or a group, as in (M,M,H,M,M)*2; default: all of the "
        "family's kind.",
    ] = ""
    d_state: Annotated[int, POSITIVE, "State size of each channel of the scan."] = 16
    d_conv: Annotated[int, POSITIVE, "Width of the causal convolution, in tokens."] = 4
    expand_factor: Annotated[int, POSITIVE, "Channels of the mixer, in units of d_model."] = 2
    dt_rank: Annotated[int, NOT_NEGATIVE, "Rank of the projection to Δ; 0: ceil(d_model / 16)."] = 0
    eigenvalues: Annotated[
        Literal["positive", "signed"],
        "Decay of a state per token: positive: exp(ΔA), in (0, 1); signed: 2 exp(ΔA) − 1, in "
        "(−1, 1), which can also track parity.",
    ] = "positive"
    vocab_size: Annotated[
        int, NOT_NEGATIVE, "Number of token ids; 0: as many as the tokenizer has."
    ] = 0
    max_seq_len: Annotated[
        int,
        POSITIVE,
        "Tokens in a training window; generation has no limit.",
    ] = 2048
    dropout: Annotated[float, FRACTION, "Share of activations dropped in training."] = 0.0
    tie_embeddings: Annotated[bool, "Use the embedding as the head's matrix."] = True
    embedding_std: Annotated[
        float,
        NOT_NEGATIVE,
        "Standard deviation of the initial embedding; 0: d_model**-0.5.",
    ] = 0.02
    norm_eps: Annotated[float, POSITIVE, "Added to the mean square in RMSNorm."] = 1e-5
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        "Dtype of matmuls; auto: float32 on a CPU, otherwise bfloat16.",
    ] = "auto"
    remat: Annotated[
        Literal["auto", "none", "dots", "full"],
        "What the backward pass recomputes: nothing, all but matmuls, all; auto: dots on a "
        "CPU, otherwise full.",
    ] = "auto"
    scan: Annotated[
        Literal[
            "auto", "reference", "sequential", "associative", "chunked", "pallas_gpu", "pallas_tpu"
        ],
        "Implementation of the selective scan; auto: by device and shape.",
    ] = "auto"
    recursion_depth: Annotated[
        int,
        NOT_NEGATIVE,
        "Hybrid: steps of the shared processor; 0: no recursion.",
    ] = 3
    recursion_expand: Annotated[
        int,
        POSITIVE,
        "Hybrid: hidden width of the processor, in units of d_model.",
    ] = 2
    recursion_reads_attention: Annotated[
        bool,
        "Hybrid: attend within each recursion step; false: once, after the recursion.",
    ] = True
    gate_skip_threshold: Annotated[
        float,
        FRACTION,
        "Hybrid, at inference: a token skips the recursion steps whose gates do not exceed this; "
        "0: none.",
    ] = 0.0
    gate_bias: Annotated[
        float,
        "Hybrid: initial bias of the depth gate; 0: each step starts half open.",
    ] = 0.0
    gate: Annotated[
        Literal["token", "channel"],
        "Hybrid: what weights a recursion step; token: a gate computed from each token's state, "
        "channel: a learned number for each channel, the same for all tokens.",
    ] = "token"
    shared_gate: Annotated[
        bool,
        "Hybrid: one gate for all recursion steps, so that recursion_depth shapes no array and a "
        "trained model can run more steps.",
    ] = False
    pass_embedding: Annotated[
        bool,
        "Hybrid: add a learned vector for each recursion step to the shared processor's input.",
    ] = False
    attention_scales: Annotated[
        tuple[int, ...],
        "Hybrid: block sizes over which attention pools; (): no attention.",
    ] = (1, 2, 4)
    attention_window: Annotated[
        int,
        NOT_NEGATIVE,
        "Hybrid: pooled positions that a query attends to at each scale; 0: max_seq_len of them, "
        "which is all of a training window (generation keeps as many).",
    ] = 256
    attention_head_size: Annotated[
        int,
        NOT_NEGATIVE,
        "Hybrid: size of an attention head; 0: 64 where it divides d_model, otherwise 32, 16 …",
    ] = 0
    fusion: Annotated[
        Literal["residual_norm", "residual_zero", "norm", "sum"],
        "Hybrid: how mixer and recursion are combined; norm: no residual around it, sum: no "
        "projection, residual_zero: the sum and a projection that starts at zero, without a norm.",
    ] = "residual_norm"
    fusion_gain: Annotated[float, "Hybrid: initial gain of the fusion's norm."] = 0.3

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, one of ``plan.KINDS``."""
        return plans.parse(self.plan) or (self._family_kind,) * self.n_layers

    @property
    def _family_kind(self) -> str:
        return {"mamba": "M", "hybrid": "H"}[self.family]

    @property
    def is_plain(self) -> bool:
        """Whether every layer is a Mamba layer, as in all other software."""
        return set(self.kinds) == {"M"} if self.plan else self.family == "mamba"

    @property
    def attends(self) -> bool:
        """Whether any layer reads attention."""
        return not self.is_plain and bool(self.attention_scales)

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with depth gates."""
        return plans.numbers("H", self.kinds) if self.recursion_depth else ()

    @property
    def layer_counts(self) -> list[tuple["ModelConfig", int]]:
        """The structure of each kind of layer, and the number of its layers."""
        kinds = self.kinds
        return [(self.of_kind(kind), kinds.count(kind)) for kind in "HAM" if kind in kinds]

    def of_kind(self, kind: str) -> "ModelConfig":
        """Returns the structure of the layers of one kind, as of a model without others."""
        fields: dict[str, dict[str, Any]] = {
            "M": {"family": "mamba"},
            "A": {"family": "hybrid", "recursion_depth": 0, "fusion": "sum"},
            "H": {"family": "hybrid"},
        }
        return dataclasses.replace(self, plan="", **fields[kind])

    def normalised(self) -> "ModelConfig":
        """Returns the same model with its plan's one spelling, "" for the family's own kind."""
        if not self.plan:
            return self
        own = set(self.kinds) == {self._family_kind}
        return dataclasses.replace(self, plan="" if own else plans.text(self.kinds))

    @property
    def resolved_attention_window(self) -> int:
        return self.attention_window or self.max_seq_len

    @property
    def resolved_embedding_std(self) -> float:
        return self.embedding_std or self.d_model**-0.5

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables, a multiple of a tile; the padding rows stay zero, because
        no id selects them, and have no logits."""
        return -(-self.vocab_size // _TABLE_ROWS) * _TABLE_ROWS

    @property
    def d_inner(self) -> int:
        return self.expand_factor * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def head_size(self) -> int:
        if self.attention_head_size:
            return self.attention_head_size
        return next(size for size in (64, 32, 16, 8, 4, 2) if self.d_model % size == 0)

    @property
    def n_heads(self) -> int:
        return self.d_model // self.head_size
