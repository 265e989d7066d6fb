"""``python -m mamba_jax <command>`` is ``mamba-jax <command>``."""

import sys

from mamba_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
