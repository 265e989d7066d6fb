"""The server as an ASGI application, for uvicorn's own command or another ASGI server:

    cd launch && uvicorn api:app --host 0.0.0.0 --port 8000 --workers 4 \\
        --timeout-graceful-shutdown 30     # seconds for running requests after SIGTERM

MAMBA_JAX_CHECKPOINT names the checkpoint: a step_N or final folder, or a run's output_dir (default:
checkpoints/final, in the current folder or in the project's). MAMBA_JAX_API_KEY is the key that
clients must send. ``mamba-jax serve`` has more settings. Each worker loads its own copy of the
model and batches its own requests, so a GPU or TPU usually has memory for one worker only.
"""

import os
import pathlib
import sys

from mamba_jax import serve
from mamba_jax.errors import UserError

_VARIABLE = "MAMBA_JAX_CHECKPOINT"
_DEFAULT = pathlib.Path("checkpoints/final")
_STARTUP_FAILURE = 3  # tells uvicorn not to restart the worker


def _checkpoint() -> str:
    if named := os.environ.get(_VARIABLE):
        return named
    for folder in (pathlib.Path.cwd(), pathlib.Path(__file__).parents[1]):
        if (folder / _DEFAULT).is_dir():
            return str(folder / _DEFAULT)
    raise UserError(
        f"{_DEFAULT} does not exist; name a checkpoint: {_VARIABLE}=DIR uvicorn api:app …"
    )


def _open():
    serve.need_packages()
    from mamba_jax.serving.server import open_app
    from mamba_jax.serving.settings import Settings

    settings = Settings(_checkpoint(), api_key=os.environ.get(serve.KEY_VARIABLE) or None)
    return open_app(settings, lambda line: print(line, file=sys.stderr, flush=True))


try:
    app = _open()
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(_STARTUP_FAILURE)
