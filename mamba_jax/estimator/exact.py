"""The memory of a step as the compiler reports it, for this device or a card that is not installed.

A card that is not installed needs its compiler (``scripts/compilers.sh``, or the extra
``estimate``) and a process of its own, ``mamba_jax.estimator.compiled``: XLA reads its flags once.
A compile takes about ten seconds of a CPU core, so figures are cached by everything they depend on.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from mamba_jax.config import RunConfig, to_dict
from mamba_jax.errors import UserError
from mamba_jax.estimator.budget import Machine
from mamba_jax.files import write_atomic

_ROOT = pathlib.Path(__file__).parents[2]
_PLUGIN = "jax_plugins.xla_cuda12"
# What the program of a step is made of.
_CODE = (
    *("config/plan.py", "models", "modules", "ops", "parallel"),
    *(f"training/{name}.py" for name in ("accumulate", "loss", "optimizer", "state", "step")),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax")


class Unavailable(Exception):
    """No compiler for the device is installed; the text says what to do."""


class Compiler:
    """Compiles train steps and reports what they need; a context manager."""

    def __init__(self, machine: Machine, cache_dir: pathlib.Path):
        """
        Args:
          machine: the machine to compile for; if not this one, a single NVIDIA card.
          cache_dir: where figures are kept.

        Raises:
          Unavailable: if there is no compiler for it.
        """
        self._machine = machine
        self._cache_dir = cache_dir / "memory"
        self._process: subprocess.Popen[str] | None = None
        self._path = "" if machine.is_here else _find_compilers(machine)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def step_bytes(self, config: RunConfig) -> int:
        """Returns the bytes that the step of a run needs on each device.

        Args:
          config: with its vocabulary, layout, dtype, remat, scan and loss chunk set.

        Raises:
          UserError: if it does not compile.
        """
        request = {"device": self._machine.kind, "count": self._machine.count}
        request |= {"config": _relevant(config)}
        path = self._cache_dir / f"{_digest(request)}.json"
        if path.is_file():
            return json.loads(path.read_text())["bytes"]
        if self._machine.is_here:
            from mamba_jax.estimator.compiled import step_bytes

            answer: dict[str, Any] = {"bytes": step_bytes(config)}
        else:
            answer = self._ask(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(request | answer) + "\n")
        return answer["bytes"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(request["config"]), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "the compiler's process ended"}
        if "error" in answer:
            raise UserError(f"cannot compile for {self._machine.kind}: {answer['error']}")
        return answer

    def _start(self) -> "subprocess.Popen[str]":
        before = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [self._path, str(_ROOT), before])),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": "",
        }
        command = [sys.executable, "-m", "mamba_jax.estimator.compiled", self._machine.kind]
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # XLA's messages about the missing card
        )
        return self._process


def _find_compilers(machine: Machine) -> str:
    """Returns the folder to put on the path of the compiler's process; "": none is needed."""
    import jax

    how = "run ./scripts/compilers.sh, or install the extra estimate"
    preset = machine.preset
    if preset is None or preset.cuda is None or machine.count > 1:
        raise Unavailable(f"no compiler is known for {machine.count} × {machine.kind}")
    if jax.__version_info__ >= (0, 11):
        raise Unavailable(
            f"jax {jax.__version__} compiles a whole step only for devices of this machine; "
            "use jax 0.10"
        )
    for folder in (pathlib.Path(".compilers"), _ROOT / ".compilers"):
        note = folder / "installed"
        if not note.is_file():
            continue
        python = ".".join(map(str, sys.version_info[:3]))
        words = note.read_text().split()
        if {python, f"jax-cuda12-pjrt=={jax.__version__}"} <= set(words):
            return str(folder.resolve())
        raise Unavailable(f"{folder} was installed for another Python or jax; {how}")
    try:
        found = importlib.util.find_spec(_PLUGIN) is not None
    except ModuleNotFoundError:  # not even the package above it
        found = False
    if not found:
        raise Unavailable(f"there is no compiler for {machine.kind}; {how}")
    return ""


def _relevant(config: RunConfig) -> dict[str, Any]:
    """Returns the config without fields that do not affect the step."""
    values = to_dict(config)
    training = "loss_chunk_tokens", "skip_spikes"
    layout = "effective_batch_size", "batch_size", "gradient_accumulation_steps"
    return {
        "model": values["model"],
        "training": {name: values["training"][name] for name in training},
        "parallel": values["parallel"],
        "vram": {name: values["vram"][name] for name in layout},
    }


def _digest(request: dict[str, Any]) -> str:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    text = json.dumps(request | {"versions": versions}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for part in _CODE:
        path = _ROOT / "mamba_jax" / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
