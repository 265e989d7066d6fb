"""Compiles the train step of a run and reads off what it needs.

``python -m mamba_jax.estimator.compiled CARD`` does so for a card that is not installed: a config
as JSON on each line of its input, ``{"bytes": …}`` or ``{"error": …}`` on each line of its output.
``exact.Compiler`` runs it, with the card's compiler on its path.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from mamba_jax.config import ParallelConfig, RunConfig, from_dict
from mamba_jax.parallel.mesh import batch_sharding, make_mesh
from mamba_jax.training.state import abstract_state
from mamba_jax.training.step import make_train_step


def step_bytes(config: RunConfig, devices: Sequence[Any] | None = None) -> int:
    """Returns the bytes that a step needs on each device: state, windows, results, temporaries.

    Args:
      config: with nothing left open; what is would be resolved as for this machine's devices.
      devices: to compile for, described or real; None: those of this machine.
    """
    mesh = make_mesh(config.parallel if devices is None else ParallelConfig(), devices)
    shape = config.vram.effective_batch_size, config.model.max_seq_len + 1
    windows = jax.ShapeDtypeStruct(shape, jax.numpy.int32, sharding=batch_sharding(mesh))
    step: Any = make_train_step(config, mesh, eot_id=0)
    compiled = step.lower(abstract_state(config, mesh), windows).compile()
    needs = compiled.memory_analysis()
    kept = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    return kept + needs.temp_size_in_bytes


def main(card: str) -> None:
    """Answers line by line until its input ends."""
    from mamba_jax.estimator.targets import cuda_target

    # XLA writes remarks to standard output too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    devices = None
    for line in sys.stdin:
        try:
            if devices is None:
                devices = list(cuda_target(card).device_set)
            answer = {"bytes": step_bytes(from_dict(json.loads(line)), devices)}
        except Exception as error:  # the parent reports it, whatever it is
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
