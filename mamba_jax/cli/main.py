"""The console command: ``mamba-jax <command> [arguments]``.

Each command is a module with ``main(argv) -> exit status``, imported only when it is called;
``python -m mamba_jax.<command>`` runs the same function.
"""

import importlib
import importlib.metadata
import platform
import sys

import mamba_jax
from mamba_jax.errors import UserError, command, did_you_mean, first_line

COMMANDS = {  # name → (module, what it does)
    "train": ("mamba_jax.train", "train a model from a config file, or resume a run"),
    "prepare_data": ("mamba_jax.prepare_data", "tokenise a corpus in advance and report on it"),
    "generate": ("mamba_jax.generate", "continue prompts with a trained model"),
    "evaluate": (
        "mamba_jax.evaluate",
        "measure perplexity on text and accuracy on tasks",
    ),
    "export": ("mamba_jax.export", "write a trained model for transformers, vLLM, llama.cpp"),
    "import_hf": ("mamba_jax.import_hf", "convert a Hugging Face model into a checkpoint"),
    "serve": ("mamba_jax.serve", "serve a trained model over HTTP"),
    "memory": ("mamba_jax.memory", "estimate a run's memory and find a layout that fits"),
    "report": (
        "mamba_jax.report",
        "model sizes, FLOPs and MFU; HTML pages of one run or several",
    ),
    "autotune": ("mamba_jax.autotune", "measure the fastest tiles of the scan on this GPU"),
    "background": (
        "mamba_jax.background",
        "train in the background; watch and stop background runs",
    ),
    "explain": ("mamba_jax.explain", "find what is wrong with a run, and what to do about it"),
    "sweep": ("mamba_jax.sweep", "train with many settings and compare the results"),
}


def usage() -> str:
    """Returns the help text: one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}\n" for name, (_, about) in COMMANDS.items()]
    return (
        "usage: mamba-jax <command> [arguments]\n\ncommands:\n"
        f"{''.join(lines)}\n`mamba-jax <command> --help` lists the arguments of one command; "
        "`mamba-jax --version` prints what a bug report needs."
    )


def version() -> str:
    """Returns the versions of this package and of what it computes with, and the devices."""
    lines = [f"mamba_jax {mamba_jax.__version__}"]
    lines.append(f"Python {platform.python_version()} on {platform.platform()}")
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    lines.append(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    try:
        import jax

        kinds = [device.device_kind for device in jax.devices()]
        lines += [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    except Exception as error:  # a broken driver may be what the report is about
        lines.append(f"no device: {first_line(error)}")
    return "\n".join(lines)


@command
def main(argv: list[str]) -> int:
    """Runs the command that the first argument names."""
    if not argv:
        print(usage(), file=sys.stderr)
        return 2
    name, *arguments = argv
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(version())
        return 0
    if name not in COMMANDS:
        raise UserError(
            f'unknown command "{name}"{did_you_mean(name, COMMANDS)} '
            f"(choices: {', '.join(COMMANDS)})"
        )
    return importlib.import_module(COMMANDS[name][0]).main(arguments)
