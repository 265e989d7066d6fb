"""The selective scan of Mamba: one function, several named implementations.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import importlib

import jax
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan import reference

# Each is the ``scan`` of the module of its name, which is imported when it is first used.
IMPLEMENTATIONS = ("reference", "sequential", "associative", "chunked")


def selective_scan(
    x_bte: Float[Array, "b t e"],
    dt_bte: Float[Array, "b t e"],
    A_en: Float[Array, "e n"],
    B_btn: Float[Array, "b t n"],
    C_btn: Float[Array, "b t n"],
    D_e: Float[Array, "e"] | None = None,
    *,
    z_bte: Float[Array, "b t e"] | None = None,
    dt_bias_e: Float[Array, "e"] | None = None,
    dt_softplus: bool = False,
    initial_state_ben: Float[Array, "b e n"] | None = None,
    reset_bt: Bool[Array, "b t"] | None = None,
    implementation: str = "auto",
    interpret: bool = False,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """Runs a diagonal state space whose step size, input and output vary with the token.

      Δ_t = softplus(dt_t + dt_bias)
      h_t = exp(Δ_t A) h_{t-1} + (Δ_t x_t) B_t
      y_t = (C_t·h_t + D x_t) silu(z_t)

    All of it is computed in float32 (in float64 where an input is), whatever the dtype of the
    inputs, and is differentiable by each of them. Any length, width and state size will do.

    Args:
      x_bte: the input, any float dtype.
      dt_bte: the step sizes: positive, or any real number where ``dt_softplus`` is set.
      A_en: the rates of decay, negative.
      B_btn: how a token enters the state.
      C_btn: how the state is read.
      D_e: the weight of the skip from x to y; None: no skip.
      z_bte: the gate's argument; None: no gate.
      dt_bias_e: added to dt before the softplus.
      dt_softplus: whether dt passes through a softplus.
      initial_state_ben: the state before the first token; None: zeros.
      reset_bt: True at the first token of a document: what came before it, the initial state
        included, is dropped. None: no resets.
      implementation: a key of ``IMPLEMENTATIONS``, or "auto": "sequential" on CPU, "chunked"
        elsewhere. A named choice is never replaced by another. A single token (t = 1) needs none
        of them: it is one plain step.

    Returns:
      y_bte in the dtype of x, and the state after the last token, float32.

    Raises:
      ValueError: if the implementation is unknown or there is no token.

    Source: arXiv 2312.00752, section 3.2 and algorithm 2. As in its code, B is discretised to first
    order (Δ B), A by zero-order hold.
    """
    if implementation == "auto":
        implementation = "sequential" if jax.default_backend() == "cpu" else "chunked"
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(
            f'unknown selective_scan implementation "{implementation}": not in {names}'
        )
    t = x_bte.shape[1]
    if t == 0:
        raise ValueError(f"selective_scan needs at least one token, got x of shape {x_bte.shape}")
    module = importlib.import_module(f"mamba_jax.ops.selective_scan.{implementation}")
    # A single token is decoding: a chunk of one would be up to 2.5 times slower.
    scan = reference.one_token if t == 1 else module.scan
    with jax.named_scope("selective_scan"):
        return scan(
            x_bte,
            dt_bte,
            A_en,
            B_btn,
            C_btn,
            D_e=D_e,
            z_bte=z_bte,
            dt_bias_e=dt_bias_e,
            dt_softplus=dt_softplus,
            initial_state_ben=initial_state_ben,
            reset_bt=reset_bt,
            interpret=interpret,
        )
