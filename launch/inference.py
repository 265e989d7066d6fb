#!/usr/bin/env python
"""Continues prompts: see ``python launch/inference.py --help`` and mamba_jax/generate.py."""

import sys

from mamba_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
