"""Causal depthwise convolution over time that stops at document starts.

Legend: b batch, t time, e channels, k kernel width, j = k - 1 remembered inputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.named_scope("causal_conv1d")
def causal_conv1d(
    x_bte: Float[Array, "b t e"],
    weight_ke: Float[Array, "k e"],
    bias_e: Float[Array, " e"],
    *,
    initial_state_bje: Float[Array, "b j e"] | None = None,
    position_bt: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t e"], Float[Array, "b j e"]]:
    """Computes ``y_t = bias + Σ_i weight_{k-1-i} x_{t-i}`` over the taps inside the document.

    Written as shifted multiply-adds: for a width of 4 they fuse into one pass over the data.

    Args:
      x_bte: the inputs.
      weight_ke: the taps, the newest token's last (as in ``torch.nn.Conv1d``).
      bias_e: the bias.
      initial_state_bje: the k - 1 inputs before the row, oldest first; zeros when None.
      position_bt: the number of tokens of the same document before each token; a tap further back
        than that reads zero. None: the row is one document (continued from the initial state).

    Returns:
      y_bte in the dtype of x, and the last k - 1 inputs (zeros for those before the start of the
      last token's document), to pass as the next initial state.

    Source: arXiv 2312.00752, section 3.4 (the conv of figure 3).
    """
    b, t, e = x_bte.shape
    k = weight_ke.shape[0]
    if initial_state_bje is None:
        initial_state_bje = jnp.zeros((b, k - 1, e), x_bte.dtype)
    if initial_state_bje.shape != (b, k - 1, e):
        raise ValueError(f"initial state {initial_state_bje.shape} is not {(b, k - 1, e)}")
    extended = jnp.concatenate([initial_state_bje.astype(x_bte.dtype), x_bte], axis=1)
    # Summed in the parameters' float32 and rounded once, at the end.
    y_bte = jnp.broadcast_to(bias_e, x_bte.shape)
    for back in range(k):
        tap_bte = extended[:, k - 1 - back : k - 1 - back + t]
        if position_bt is not None:
            tap_bte = jnp.where((position_bt >= back)[..., None], tap_bte, 0)
        y_bte = y_bte + tap_bte * weight_ke[k - 1 - back]
    state_bje = extended[:, t:]
    if position_bt is not None:
        back_j = jnp.arange(k - 2, -1, -1)
        state_bje = jnp.where((position_bt[:, -1:] >= back_j)[..., None], state_bje, 0)
    return y_bte.astype(x_bte.dtype), state_bje
