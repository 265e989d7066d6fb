"""The plans that are compared: models of as many parameters, within 10%, behind one interface.

The reference is plain Mamba, ``M*6``. A variant changes one thing of its hybrid.
"""

import dataclasses
import functools
from typing import Any

import jax

from benchmarks.evidence.tasks import LENGTH, SEPARATOR, VOCABULARY
from benchmarks.harness import Context
from benchmarks.peers import gpt2
from mamba_jax.config import ModelConfig
from mamba_jax.config import plan as layer_plans
from mamba_jax.costs import flops
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.models import build

# Small inputs and outputs of tiny models drown in the layers' own at the product's 0.02.
EMBEDDING_STD = 0.3
_BASE = {
    "family": "hybrid",
    "d_model": 32,
    "d_state": 16,
    "vocab_size": VOCABULARY,
    "max_seq_len": LENGTH,
    "embedding_std": EMBEDDING_STD,
    "attention_window": 32,
    "attention_head_size": 8,
    "fusion": "residual_zero",
    "dtype": "float32",
    "remat": "none",
}
TRANSFORMER = "Transformer"
_TODAY = {"fusion": "residual_norm"}
# A gate's sigmoid is exactly 1 in float32 from about 17 up, and its gradient exactly 0.
_NO_GATES = {"gate_bias": 30.0}
_NO_ATTENTION: dict[str, Any] = {"attention_scales": ()}
_AMHMA = {"d_model": 30, "attention_head_size": 10}

# Name → plan, and the fields that differ from those above.
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "M*6": ("M*6", {}),
    "MMAMMM": ("M,M,A,M*3", {}),
    "AMAMA": ("A,M,A,M,A", {}),
    TRANSFORMER: ("", {}),
    "MMHMM": ("M,M,H,M,M", {}),
    "AMHMA": ("A,M,H,M,A", _AMHMA),
    "H*3": ("H*3", _TODAY),
    "MMHMM residual_norm": ("M,M,H,M,M", _TODAY),
    "MMHMM sum": ("M,M,H,M,M", {"fusion": "sum"}),
    "MMHMM depth 1": ("M,M,H,M,M", {"recursion_depth": 1}),
    "MMHMM no gates": ("M,M,H,M,M", _NO_GATES),
    "MMHMM no attention": ("M,M,H,M,M", _NO_ATTENTION),
    "MMHMM channel gate": ("M,M,H,M,M", {"gate": "channel"}),
    "MMHMM shared gate": ("M,M,H,M,M", {"shared_gate": True}),
    "MMHMM pass embedding": ("M,M,H,M,M", {"pass_embedding": True}),
    # Without attention an A is an M: AMHMA is MMHMM there.
    "AMHMA depth 1": ("A,M,H,M,A", _AMHMA | {"recursion_depth": 1}),
    "AMHMA no gates": ("A,M,H,M,A", _AMHMA | _NO_GATES),
    "H*3 depth 1": ("H*3", _TODAY | {"recursion_depth": 1}),
    "H*3 no gates": ("H*3", _TODAY | _NO_GATES),
    "H*3 no attention": ("H*3", _TODAY | _NO_ATTENTION | {"d_model": 36}),
}
REFERENCE = "M*6"


@dataclasses.dataclass(frozen=True)
class Model:
    """What training needs of a model.

    Attributes:
      fields: all that makes it what it is, for its record.
      parameters: the true count.
      token_flops: of training, per token: matrix products and elementwise operations of forward
        and backward; nothing that is recomputed, no optimizer.
      config: of ours; None: the Transformer.
    """

    fields: dict[str, Any]
    parameters: int
    token_flops: float
    config: ModelConfig | None = None
    transformer: gpt2.Gpt2Config | None = None

    @property
    def gated(self) -> bool:
        return self.config is not None and bool(self.config.gated_layers)

    @property
    def gated_by_token(self) -> bool:
        """Whether tokens have gates of their own."""
        return self.config is not None and self.gated and self.config.gate == "token"

    def init(self, key: jax.Array) -> Any:
        """Makes the parameters."""
        if self.config is not None:
            return build.init(self.config, key)
        params = gpt2.init(self.transformer, key)
        # Its own are of 0.02.
        return params | {"embedding": params["embedding"] * (EMBEDDING_STD / 0.02)}

    def hidden(self, params: Any, tokens_bt: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns x_btd before the head, and what the model reports of its gates."""
        segments_bt = segments(tokens_bt)
        if self.config is not None:
            x_btd, aux, _ = build.forward(
                params, self.config, tokens_bt, segment_ids_bt=segments_bt
            )
            return x_btd, aux
        return gpt2.forward(params, self.transformer, tokens_bt, segments_bt), {}

    def head(self, params: Any) -> jax.Array:
        """Returns the head's matrix, (VOCABULARY, d)."""
        if self.config is not None:
            return build.head_weight(params, self.config)
        return params["embedding"]


def segments(tokens_bt: jax.Array) -> jax.Array:
    """Numbers the documents of a row: each begins at a separator."""
    return (tokens_bt == SEPARATOR).astype("int32").cumsum(axis=1)


@functools.cache
def model_of(name: str) -> Model:
    """Returns the model of a plan."""
    plan, fields = PLANS[name]
    if name == TRANSFORMER:
        return _transformer()
    config = ModelConfig(
        **(_BASE | fields | {"plan": plan, "n_layers": len(layer_plans.parse(plan))})
    )
    # Without fields that keep their default: one that a later version adds changes nothing.
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return Model(changed, parameter_count(config).total, _token_flops(config), config=config)


def _token_flops(config: ModelConfig) -> float:
    parts = flops.parts(config, flops.Setting(LENGTH, 1, dtype="float32", remat="none"))
    works = [
        work for part in parts if part.name != "optimizer" for work in (part.forward, part.backward)
    ]
    return float(sum(work.matmul_flops + work.elementwise_flops for work in works))


def _transformer() -> Model:
    """The peer benchmarks' Transformer: attention and MLP only."""
    like = model_of(REFERENCE).config
    assert like is not None
    shape = gpt2.config_like(like, Context("cpu", "cpu"), remat=False)
    # In float32 wherever it runs, as the others are.
    shape = dataclasses.replace(shape, dtype=jax.numpy.dtype("float32"))
    params = jax.eval_shape(lambda: gpt2.init(shape, jax.random.key(0)))
    d, f, v = shape.d_model, shape.d_ff, shape.vocab_size
    keys, heads = flops.mean_keys(LENGTH, LENGTH, 1), d // shape.head_size
    macs = shape.n_layers * (4 * d * d + 2 * d * f + 2 * d * keys) + v * d
    # Per layer: two norms (7 d), biases and residuals (3 d, d, f, 2 d), softmax, GELU (8 f).
    elementwise = shape.n_layers * (20 * d + 9 * f + 6 * heads * keys) + 7 * d + 3 * v
    return Model(
        fields={"model": TRANSFORMER, "embedding_std": EMBEDDING_STD}
        | {name: str(value) for name, value in dataclasses.asdict(shape).items()},
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        token_flops=3.0 * (2 * macs + elementwise),
        transformer=shape,
    )
