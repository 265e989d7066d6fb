"""Writes a trained model in the format of another engine.

python -m mamba_jax.export --checkpoint checkpoints/quickstart --format hf --out my-model --verify
"""

import argparse
import pathlib
import sys

from mamba_jax.errors import UserError, command

FORMATS = ("hf", "safetensors")
DTYPES = ("f32", "bf16", "f16")


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    run(parse(argv))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax export", description="Write a trained model for another engine."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a step_N or final folder, or a run's output_dir: its newest intact checkpoint",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="hf: a folder for transformers and vLLM; safetensors: its weights alone",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--dtype", default="f32", choices=DTYPES, help="of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load it with transformers and compare logits and greedy text (hf)",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Reads the checkpoint, writes the folder, verifies it, gives it its name."""
    from mamba_jax.data.tokenizer import load_saved
    from mamba_jax.exporting import hf, tensors, tokenizer_files
    from mamba_jax.exporting.folder import new_folder
    from mamba_jax.training import checkpoint

    if arguments.verify and arguments.format != "hf":
        raise UserError("--verify needs --format hf: bare weights are no model to run")
    log = lambda line: print(line, file=sys.stderr)
    with new_folder(pathlib.Path(arguments.out)) as folder:
        path = checkpoint.resolve(arguments.checkpoint, log)
        metadata = checkpoint.read_metadata(path)
        model = metadata.config.model
        tokenizer = load_saved(path, metadata.config.data.tokenizer)
        n_ids = tokenizer_files.id_count(tokenizer, metadata.config.data.fim_rate > 0)
        table = tensors.to_hf(checkpoint.restore_params(path), model, n_ids)
        hf.write_weights(folder / hf.WEIGHTS, table, arguments.dtype)
        if arguments.format == "hf":
            hf.write_companions(folder, metadata, tokenizer, arguments.dtype)
        if arguments.verify:
            from mamba_jax.exporting.verify import check_hf

            found = check_hf(folder, table, model, tokenizer, arguments.dtype)
            print(
                f"verified: largest difference of logits {found.largest_difference:.2e} "
                f"(largest logit {found.largest_logit:.3g}), {found.same_greedy} of "
                f"{found.n_greedy} greedy tokens the same; {arguments.dtype} moves logits by up "
                f"to {found.drift:.2e}"
            )
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
