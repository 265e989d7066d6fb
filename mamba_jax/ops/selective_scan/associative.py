"""The selective scan as one associative scan over time: the textbook form.

h_t = a_t h_{t-1} + u_t composes associatively as pairs (a, u), so that all prefixes are found in
log(t) parallel passes (Blelloch 1990; arXiv 2208.04933, section 2.2). Every pass reads and writes
all B·L·D·N states, and a gradient keeps several copies of them: use it for comparison on short
sequences, not for training.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan.decay import decay
from mamba_jax.ops.selective_scan.epilogue import with_epilogue


@with_epilogue
def scan(
    x_bte: Float[Array, "b t e"],
    dt_bte: Float[Array, "b t e"],
    A_en: Float[Array, "e n"],
    B_btn: Float[Array, "b t n"],
    C_btn: Float[Array, "b t n"],
    initial_state_ben: Float[Array, "b e n"],
    reset_bt: Bool[Array, "b t"] | None,
    signed: bool,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """See ``epilogue.with_epilogue``. Memory O(B·L·D·N), forward as well as backward."""
    x_bte, B_btn, C_btn = (v.astype(dt_bte.dtype) for v in (x_bte, B_btn, C_btn))
    decay_bten = decay(jnp.exp(dt_bte[..., None] * A_en), signed)
    if reset_bt is not None:
        decay_bten = jnp.where(reset_bt[:, :, None, None], 0, decay_bten)
    u_bten = (dt_bte * x_bte)[..., None] * B_btn[:, :, None, :]
    u_bten = u_bten.at[:, 0].add(decay_bten[:, 0] * initial_state_ben)
    _, state_bten = lax.associative_scan(then, (decay_bten, u_bten), axis=1)
    # A sum, not a dot, which would be rounded to TF32 or bfloat16 on GPU and TPU.
    return (state_bten * C_btn[:, :, None, :]).sum(-1), state_bten[:, -1]


def then(first, second):
    """Composes two affine maps h → a h + u, the first one applied first."""
    a_first, u_first = first
    a_second, u_second = second
    return a_first * a_second, a_second * u_first + u_second
