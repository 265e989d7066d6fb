"""The selective scan of Mamba: one function, several named implementations.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import functools
import importlib
import logging
from types import ModuleType

import jax
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan import reference
from mamba_jax.ops.selective_scan.decay import EIGENVALUES

# Each is the ``scan`` of the module of its name, which is imported when it is first used.
IMPLEMENTATIONS = (
    "reference",
    "sequential",
    "associative",
    "chunked",
    "pallas_gpu",
    "pallas_tpu",
)
# As ``jax.default_backend()`` names them; the others run everywhere.
_PLATFORM = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}

_logger = logging.getLogger("mamba_jax")


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
    eigenvalues: str = "positive",
    implementation: str = "auto",
    interpret: bool = False,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """Runs a diagonal state space whose step size, input and output vary with the token.

      Δ_t = softplus(dt_t + dt_bias)
      h_t = a_t h_{t-1} + (Δ_t x_t) B_t,   a_t = exp(Δ_t A), or 2 exp(Δ_t A) − 1
      y_t = (C_t·h_t + D x_t) silu(z_t)

    All of it is computed in float32 (in float64 if an input is float64), whatever the dtype of the
    inputs, and is differentiable with respect to each of them. Any length, width and state size
    works.

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
      eigenvalues: "positive": a = exp(Δ A); "signed": a = 2 exp(Δ A) − 1, from −1 to 1. Every
        implementation takes both.
      implementation: one of ``IMPLEMENTATIONS``, or "auto": ``choose`` decides, and the logger
        "mamba_jax" reports the choice once. A named choice is never replaced by another. A single
        token (t = 1) uses none of them: it is one plain step.
      interpret: whether Pallas kernels run as plain JAX, slowly, on any platform: for tests. The
        other implementations have no kernels and are the same either way.

    Returns:
      y_bte in the dtype of x, and the state after the last token, float32.

    Raises:
      ValueError: if the implementation or the kind of eigenvalues is unknown, the implementation
        does not take this shape or dtype (the message says what it takes), or there is no token.

    Source: arXiv 2312.00752, section 3.2 and algorithm 2. As in its code, B is discretised to first
    order (Δ B), A by zero-order hold. Signed eigenvalues: arXiv 2411.12537.
    """
    _, t, e = x_bte.shape
    if t == 0:
        raise ValueError(f"selective_scan needs at least one token, got x of shape {x_bte.shape}")
    if eigenvalues not in EIGENVALUES:
        raise ValueError(
            f'unknown selective_scan eigenvalues "{eigenvalues}": not in {", ".join(EIGENVALUES)}'
        )
    if implementation == "auto":
        implementation = choose(jax.default_backend(), x_bte.dtype, e, A_en.shape[1])
    # A single token is decoding: a chunk of one would be up to 2.5 times slower.
    scan = _module(implementation).scan if t > 1 else reference.one_token
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
            signed=eigenvalues == "signed",
            interpret=interpret,
        )


def choose(platform: str, dtype: jax.typing.DTypeLike, d_inner: int, d_state: int) -> str:
    """Returns the implementation that "auto" chooses.

    CPU: "sequential". GPU: "pallas_gpu" where its kernels take the shape, else "chunked". TPU:
    "chunked", as "pallas_tpu" has been compiled for TPUs but not yet run on one; it can be
    chosen by name. The length of the sequence does not matter, except that a single token is
    always a plain step.

    Args:
      platform: as ``jax.default_backend()`` names it.
      dtype: of x.
      d_inner: channels of one device's x.
      d_state: states of a channel.
    """
    name = "sequential" if platform == "cpu" else "chunked"
    if platform == "gpu" and not unsupported("pallas_gpu", platform, dtype, d_inner, d_state):
        name = "pallas_gpu"
    _log_once(
        f"selective scan: {name} ({platform}, {jax.numpy.dtype(dtype)}, "
        f"d_inner {d_inner}, d_state {d_state})"
    )
    return name


def unsupported(
    implementation: str, platform: str, dtype: jax.typing.DTypeLike, d_inner: int, d_state: int
) -> str | None:
    """Returns why a named implementation cannot run, before anything is compiled.

    ``selective_scan`` itself does not check the platform: a program may be lowered for a platform
    other than this machine's.

    Args:
      implementation: one of ``IMPLEMENTATIONS``; the others as in ``choose``.

    Returns:
      None if it can, else a sentence with the reason.

    Raises:
      ValueError: if there is no such implementation.
    """
    supports = getattr(_module(implementation), "supports", None)
    if supports is None:
        return None
    needed = _PLATFORM[implementation]
    if platform != needed:
        return f"the {implementation} scan runs on a {needed.upper()}, not on a {platform.upper()}"
    return supports(d_inner, d_state, dtype)


def _module(implementation: str) -> ModuleType:
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(
            f'unknown selective_scan implementation "{implementation}": not in {names}'
        )
    return importlib.import_module(f"mamba_jax.ops.selective_scan.{implementation}")


@functools.cache
def _log_once(line: str) -> None:
    _logger.info(line)
