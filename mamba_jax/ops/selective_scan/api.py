"""The selective scan of Mamba: one function, several named implementations.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan import chunked, reference, sequential

IMPLEMENTATIONS = {
    "reference": reference.scan,
    "chunked": chunked.scan,
    "sequential": sequential.scan,
}


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
    b, t, e = x_bte.shape
    if t == 0:
        raise ValueError(f"selective_scan needs at least one token, got x of shape {x_bte.shape}")

    with jax.named_scope("selective_scan"):
        dtype = jnp.result_type(jnp.float32, x_bte, dt_bte, A_en, B_btn, C_btn)
        dt_bte, A_en = dt_bte.astype(dtype), A_en.astype(dtype)
        if dt_bias_e is not None:
            dt_bte += dt_bias_e.astype(dtype)
        if dt_softplus:
            dt_bte = jax.nn.softplus(dt_bte)
        if initial_state_ben is None:
            state_ben = jnp.zeros((b, e, A_en.shape[1]), dtype)
        else:
            state_ben = initial_state_ben.astype(dtype)

        if t == 1:  # decoding: a chunk of one token would be up to 2.5 times slower
            token = (x_bte[:, 0], dt_bte[:, 0], A_en, B_btn[:, 0], C_btn[:, 0])
            reset_b = None if reset_bt is None else reset_bt[:, 0]
            y_be, state_ben = reference.advance(state_ben, *token, reset_b)
            y_bte = y_be[:, None]
        else:
            core = IMPLEMENTATIONS[implementation]
            y_bte, state_ben = core(x_bte, dt_bte, A_en, B_btn, C_btn, state_ben, reset_bt)

        if D_e is not None:
            y_bte += D_e.astype(dtype) * x_bte.astype(dtype)
        if z_bte is not None:
            y_bte *= jax.nn.silu(z_bte.astype(dtype))
        return y_bte.astype(x_bte.dtype), state_ben
