"""The selective scan in torch: mamba_ssm's CUDA kernel, mambapy's pscan, and a plain loop.

Shapes: b batch, t time, e d_inner, n d_state; the kernel expects channels before time.
"""

from typing import Any

import numpy as np

from benchmarks.harness import Context, NotMeasured, Prepared, available_host_bytes, import_peer
from benchmarks.peers.torch_common import memory_of, on_device, wait

KERNEL, PSCAN, LOOP = "mamba_ssm CUDA", "mambapy pscan", "torch.compile of a loop"
LONGEST_LOOP = 2048  # tokens; beyond, launches alone take tens of seconds


def names(context: Context) -> list[str]:
    """Returns the implementations that run on this platform."""
    return {"gpu": [KERNEL, PSCAN, LOOP], "cpu": [PSCAN], "tpu": []}[context.platform]


def prepare(
    name: str,
    block: dict[str, np.ndarray],
    repeats: tuple[int, int, int],
    backward: bool,
    context: Context,
) -> Prepared:
    """Puts the inputs on the device.

    Args:
      name: one of ``names``.
      block: float32, as ``benchmarks.scan.make_inputs`` makes it.
      repeats: how often to repeat its arrays with a time axis.
      backward: whether the gradients of all inputs are wanted too.
      context: that of the run.
    """
    torch = import_peer("torch")
    memory = memory_of(context)
    half = torch.bfloat16 if context.platform == "gpu" else torch.float32
    tensors = {}
    for key, value in block.items():
        tensor = on_device(torch.from_numpy(value), context)
        if value.ndim == 3:
            tensor = tensor.to(half).repeat(repeats)
            if name == KERNEL:
                tensor = tensor.transpose(1, 2).contiguous()
        tensors[key] = tensor.requires_grad_(backward)
    dy_bte = tensors.pop("dy_bte").detach()
    scan = {KERNEL: _kernel, PSCAN: _pscan, LOOP: _loop}[name](tensors, context)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            y_bte = scan(tensors)
            if backward:
                torch.autograd.grad(y_bte, list(tensors.values()), dy_bte)
        wait(context)

    return Prepared(run, memory)


def _kernel(inputs: dict[str, Any], context: Context) -> Any:
    function = import_peer("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def scan(v: dict[str, Any]) -> Any:
        return function(
            v["x_bte"],
            v["dt_bte"],
            v["A_en"],
            v["B_btn"],
            v["C_btn"],
            v["D_e"],
            z=v["z_bte"],
            delta_bias=v["dt_bias_e"],
            delta_softplus=True,
        )

    return scan


def _pscan(inputs: dict[str, Any], context: Context) -> Any:
    pscan = import_peer("mambapy.pscan").pscan
    functional = import_peer("torch.nn.functional")
    # It stores states, decays and inputs, padded to a power of two, and their gradients.
    needed_bytes = 10 * inputs["x_bte"].numel() * inputs["A_en"].shape[1] * 4
    if context.platform == "cpu" and needed_bytes > available_host_bytes():
        raise NotMeasured(f"needs about {needed_bytes / 1e9:.0f} GB")

    def scan(v: dict[str, Any]) -> Any:
        dt_bte = functional.softplus(v["dt_bte"].float() + v["dt_bias_e"])
        x_bte = v["x_bte"].float()
        decay_bten = (dt_bte[..., None] * v["A_en"]).exp()
        added_bten = (dt_bte * x_bte)[..., None] * v["B_btn"].float()[:, :, None]
        h_bten = pscan(decay_bten, added_bten)
        y_bte = (h_bten @ v["C_btn"].float()[..., None]).squeeze(-1) + v["D_e"] * x_bte
        return (y_bte * functional.silu(v["z_bte"].float())).to(v["x_bte"].dtype)

    return scan


def _loop(inputs: dict[str, Any], context: Context) -> Any:
    torch = import_peer("torch")
    functional = torch.nn.functional
    if inputs["x_bte"].shape[1] > LONGEST_LOOP:
        raise NotMeasured(f"a loop of more than {LONGEST_LOOP} tokens takes too long")

    @torch.compile
    def step(h_ben: Any, x_be: Any, dt_be: Any, A_en: Any, B_bn: Any, C_bn: Any) -> Any:
        h_ben = (dt_be[..., None] * A_en).exp() * h_ben + (dt_be * x_be)[..., None] * B_bn[:, None]
        return h_ben, (h_ben * C_bn[:, None]).sum(-1)

    def scan(v: dict[str, Any]) -> Any:
        dt_bte = functional.softplus(v["dt_bte"].float() + v["dt_bias_e"])
        x_bte, B_btn, C_btn = v["x_bte"].float(), v["B_btn"].float(), v["C_btn"].float()
        h_ben = x_bte.new_zeros(len(x_bte), *v["A_en"].shape)
        outputs = []
        for x_be, dt_be, B_bn, C_bn in zip(
            *(a.unbind(1) for a in (x_bte, dt_bte, B_btn, C_btn)), strict=True
        ):
            h_ben, y_be = step(h_ben, x_be, dt_be, v["A_en"], B_bn, C_bn)
            outputs.append(y_be)
        y_bte = torch.stack(outputs, 1) + v["D_e"] * x_bte
        return (y_bte * functional.silu(v["z_bte"].float())).to(v["x_bte"].dtype)

    return scan
