#!/usr/bin/env python
"""Writes a trained model as ONNX: ``python launch/export_to_onnx.py --checkpoint DIR``.

The same as ``python -m mamba_jax.export --format onnx``; without ``--out`` the folder is named
after the checkpoint, here.
"""

import argparse
import pathlib
import sys

from mamba_jax import export


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(epilog="other options: python -m mamba_jax.export --help")
    parser.add_argument("--checkpoint", required=True, metavar="DIR")
    parser.add_argument("--out", metavar="DIR", help="default: the checkpoint's name and -onnx")
    options, more = parser.parse_known_args(argv)
    out = options.out or f"{pathlib.Path(options.checkpoint).resolve().name}-onnx"
    return export.main(
        ["--checkpoint", options.checkpoint, "--out", out, *more, "--format", "onnx"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
