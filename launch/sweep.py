#!/usr/bin/env python
"""Runs a sweep: see ``python launch/sweep.py --help`` and mamba_jax/sweep.py."""

import sys

from mamba_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
