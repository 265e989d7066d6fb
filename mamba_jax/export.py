"""Exports a trained model to the format of another engine.

python -m mamba_jax.export --checkpoint checkpoints/quickstart --format hf --out my-model --verify
"""

import argparse
import pathlib
import sys

from mamba_jax.cli.flags import add_checkpoint
from mamba_jax.errors import UserError, command

_DTYPES = {  # format → dtypes of the weights
    "hf": ("f32", "bf16", "f16"),
    "safetensors": ("f32", "bf16", "f16"),
    "gguf": ("f32", "bf16", "f16", "q8_0"),
    "onnx": ("f32",),
}


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    run(parse(argv))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax export", description="Export a trained model to another engine."
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=_DTYPES,
        help="hf: a folder for transformers and vLLM; safetensors: its weights alone; gguf: for "
        "llama.cpp and Ollama; onnx: two graphs for onnxruntime",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to create")
    parser.add_argument(
        "--dtype",
        default="f32",
        metavar="NAME",
        help="dtype of the weights: f32, bf16 or f16; gguf also takes q8_0; onnx only f32 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load the export with transformers (hf), llama.cpp (gguf) or onnxruntime (onnx) and "
        "compare token ids, logits and greedy text; an export that differs is removed",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Reads the checkpoint, writes and verifies the folder, then renames it to --out."""
    check(arguments)
    from mamba_jax.checkpoints.arrays import restore_params
    from mamba_jax.exporting import gguf_file, hf, onnx_file, tensors, tokenizer_files
    from mamba_jax.exporting.folder import new_folder
    from mamba_jax.generation.load import find

    form, dtype = arguments.format, arguments.dtype
    log = lambda line: print(line, file=sys.stderr)
    with new_folder(pathlib.Path(arguments.out)) as folder:
        found = find(arguments.checkpoint, log)
        metadata, tokenizer = found.metadata, found.tokenizer
        model = metadata.config.model
        if form == "gguf":
            gguf_file.check(model)
        elif form == "hf":
            hf.check(model)
        if model.gate_skip_threshold:
            log(
                f"model.gate_skip_threshold={model.gate_skip_threshold} is not exported: exported "
                "models run every recursion step"
            )
        n_ids = tokenizer_files.id_count(tokenizer, metadata.config.data.fim_rate > 0)
        table = tensors.to_hf(restore_params(found.path), model, n_ids)
        template = tokenizer_files.own_template(
            found.path
        )  # of an import that was not trained further
        if form == "gguf":
            gguf_file.write(folder, table, metadata, tokenizer, dtype, template)
        elif form == "onnx":
            onnx_file.write(folder, table, metadata, tokenizer, template)
        else:
            hf.write_weights(folder / hf.WEIGHTS, table, dtype)
        if form == "hf":
            hf.write_companions(folder, metadata, tokenizer, dtype, template)
        if arguments.verify:
            from mamba_jax.exporting import verify

            engines = {
                "hf": verify.check_hf,
                "gguf": verify.check_gguf,
                "onnx": verify.check_onnx,
            }
            log(engines[form](folder, table, model, tokenizer, dtype).summary(dtype))
    log(f"wrote {arguments.out}")


def check(arguments: argparse.Namespace) -> None:
    """Refuses unsupported combinations before anything is read.

    Raises:
      UserError: see its text.
    """
    form, dtype = arguments.format, arguments.dtype
    if arguments.verify and form == "safetensors":
        raise UserError("--verify needs --format hf, gguf or onnx; bare weights cannot be run")
    if dtype not in _DTYPES[form]:
        more = ""
        if form == "gguf":
            more = "; for others, such as K-quants, run llama.cpp's llama-quantize on the file"
        if form == "onnx":
            more = ": the graphs compute in float32"
        raise UserError(
            f"--dtype {dtype} is not one of {', '.join(_DTYPES[form])} for --format {form}{more}"
        )


if __name__ == "__main__":
    sys.exit(main())
