"""What all torch peers need: their device, waiting for it, and the memory they took."""

import os
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Context, NotMeasured, import_peer


def on_device(thing: Any, context: Context) -> Any:
    """Moves a tensor or module to where this run measures."""
    torch = import_peer("torch")
    if context.platform == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return thing
    if context.platform == "gpu" and torch.cuda.is_available():
        return thing.to("cuda")
    raise NotMeasured(f"this torch ({torch.__version__}) cannot use the {context.platform}")


def wait(context: Context) -> None:
    """Returns when the device has done its work."""
    if context.platform == "gpu":
        import_peer("torch").cuda.synchronize()


def memory_of(context: Context) -> Callable[[], dict[str, float]]:
    """Measures the most that torch allocates on a GPU from here on; nothing on a CPU.

    Call it before a candidate allocates anything, and its result after the candidate ran.
    """
    if context.platform != "gpu":
        return dict
    cuda = import_peer("torch").cuda
    if not cuda.is_available():
        return dict
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    return lambda: {"program_bytes": float(cuda.max_memory_allocated() - before)}
