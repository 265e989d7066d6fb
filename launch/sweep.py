#!/usr/bin/env python
"""Runs a sweep: see ``python launch/sweep.py --help`` and mamba_jax/sweep.py."""

import sys

from mamba_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["sweep", *sys.argv[1:]]))
