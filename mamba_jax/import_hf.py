"""Imports a Mamba model, in Hugging Face's or the original format, as a checkpoint.

python -m mamba_jax.import_hf --model state-spaces/mamba-130m-hf --out checkpoints/mamba-130m
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from mamba_jax.errors import UserError, command

# The tokenizer of all state-spaces models, whose original folders contain none.
ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    run(parse(argv))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax import_hf",
        description="Import a Mamba model of Hugging Face's or the original format.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|ID",
        help="a folder, or a Hugging Face Hub id such as state-spaces/mamba-130m-hf",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="the folder to create (default: checkpoints/NAME)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="as data.tokenizer (default: the model's own tokenizer.json, or "
        f"{ORIGINAL_TOKENIZER} if it has none)",
    )
    parser.add_argument(
        "--max_seq_len",
        type=int,
        default=2048,
        metavar="N",
        help="tokens per window in further training (default: %(default)s)",
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Reads the model; writes ``step_0`` and a config for further training."""
    import jax

    from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
    from mamba_jax.checkpoints.folder import step_name
    from mamba_jax.config import DataConfig, RunConfig
    from mamba_jax.data.tokenizers.load import load_tokenizer
    from mamba_jax.exporting import reading, tokenizer_files
    from mamba_jax.exporting.folder import check_room, new_folder
    from mamba_jax.training.state import state_of

    if arguments.max_seq_len < 1:
        raise UserError(f"max_seq_len={arguments.max_seq_len} must be at least 1")
    name = pathlib.Path(arguments.model).expanduser().resolve().name
    out = pathlib.Path(arguments.out or f"checkpoints/{name}")
    log = lambda line: print(line, file=sys.stderr)
    with new_folder(out) as folder:
        source = reading.find(arguments.model)
        tokenizer = load_tokenizer(
            arguments.tokenizer
            or (str(source) if (source / "tokenizer.json").is_file() else ORIGINAL_TOKENIZER)
        )
        model, params = reading.read(source)
        if tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the model has rows "
                f"for {model.vocab_size}; give the model's own: --tokenizer NAME"
            )
        model = dataclasses.replace(model, max_seq_len=arguments.max_seq_len)
        config = RunConfig(name=name, model=model, data=DataConfig(tokenizer=tokenizer.name))
        state = state_of(params, config)
        # The moments of step 0 are zeros, which are stored in next to nothing.
        check_room(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        metadata = Metadata(config, 0, 0, "", tokenizer_identity=tokenizer.identity)
        files = dict(tokenizer.files)
        if template := tokenizer_files.own_template(source):
            # For exports of this very checkpoint. Later training renders chats in our format, so
            # its checkpoints have no such file.
            files[tokenizer_files.TEMPLATE_NAME] = template.encode()
        with CheckpointWriter(
            folder, keep_last=1, keep_every=0, log=lambda line: None, files=files
        ) as writer:
            writer.save(step_name(0), state, metadata)
        # The checkpoint has its own copy of the tokenizer, independent of the source folder.
        own = str(out / step_name(0)) if tokenizer.files else tokenizer.name
        fields = {"model": dataclasses.asdict(config.model), "data": {"tokenizer": own}}
        (folder / "train.json").write_text(json.dumps(fields, indent=2) + "\n")
    if template:
        log(
            "the model has a chat template of its own: exports of this checkpoint keep it; "
            "generating, serving and training here render chats as `user: …`, `assistant: …`"
        )
    log(
        f"wrote {out}; to train it further: python -m mamba_jax.train --config {out}/train.json "
        f"--resume {out} --output_dir NEW --data_dir DATA"
    )


if __name__ == "__main__":
    sys.exit(main())
