#!/usr/bin/env python
"""Continues prompts: see ``python launch/inference.py --help`` and mamba_jax/generate.py."""

import sys

from mamba_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main(["generate", *sys.argv[1:]]))
