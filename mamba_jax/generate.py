"""Continues prompts with a trained model, streaming the text.

python -m mamba_jax.generate --checkpoint checkpoints/quickstart --prompt "def "
python -m mamba_jax.generate --checkpoint DIR --prompt_file prompts.txt --batch_size 8
"""

import argparse
import pathlib
import sys

from mamba_jax.errors import UserError, command, reader_has_gone


@command
def main(argv: list[str]) -> int:
    """Runs the command; 130 after Ctrl-C."""
    arguments = parse(argv)
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    try:
        run(arguments, prompts)
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:
        reader_has_gone()
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax generate",
        description="Continue prompts with a trained model.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a step_N or final folder, or a run's output_dir: its newest intact checkpoint",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help='the text to continue; "" starts a document')
    source.add_argument(
        "--prompt_file",
        metavar="FILE",
        help="one prompt a line; '-' is standard input, read as well where it is a pipe and no "
        "prompt is given",
    )
    parser.add_argument(
        "--suffix",
        metavar="TEXT",
        help="write what lies between each prompt and this text; for a model trained with "
        "data.fim_rate",
    )
    for name, type_, default, about in (
        ("--max_tokens", int, 200, "new tokens per prompt"),
        ("--temperature", float, 0.8, "0: no randomness"),
        ("--top_k", int, 50, "choose among so many of the likeliest tokens; 0: all"),
        ("--top_p", float, 0.95, "and among the fewest that hold this probability; 1: all"),
        ("--seed", int, 0, "of the randomness"),
        ("--batch_size", int, 8, "prompts at a time"),
    ):
        about += " (default: %(default)s)"
        parser.add_argument(name, type=type_, default=default, help=about)
    parser.add_argument(
        "--head",
        default="exact",
        metavar="NAME",
        help="exact, or int8: rounds the output matrix; on a CPU a single prompt's tokens come "
        "faster and are slightly other ones (default: %(default)s)",
    )
    parser.add_argument(
        "--scan",
        metavar="NAME",
        help="of the implementation of the selective scan: auto, sequential, chunked, … "
        "(default: the checkpoint's)",
    )
    return parser.parse_args(argv)


def read_prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    """Returns the prompts that the arguments name.

    Raises:
      UserError: if there are none.
    """
    if prompt is not None:
        return [prompt]
    if prompt_file is None and sys.stdin.isatty():
        raise UserError("no prompt: give --prompt TEXT or --prompt_file FILE, or pipe one in")
    if prompt_file in (None, "-"):
        name, lines = "standard input", sys.stdin.read().splitlines()
    else:
        name = f"prompt file {prompt_file}"
        try:
            lines = pathlib.Path(prompt_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"cannot read {name}: {reason}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{name} holds no prompt: write one a line")
    return prompts


def run(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Loads the checkpoint and prints prompts and texts."""
    from mamba_jax.config import with_scan
    from mamba_jax.data.tokenizer import load_saved
    from mamba_jax.generation import check_settings, generate_text
    from mamba_jax.models.language_model import matmul_dtype
    from mamba_jax.modules.mamba import resolve_scan
    from mamba_jax.training import checkpoint

    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "batch_size", "head")
    settings = {name: getattr(arguments, name) for name in names}
    check_settings(**settings)  # before a large checkpoint is read
    log = lambda line: print(line, file=sys.stderr)
    path = checkpoint.resolve(arguments.checkpoint, log)
    metadata = checkpoint.read_metadata(path)
    log(f"{path}: {metadata.config.name}, step {metadata.step}")
    if arguments.suffix is not None and not metadata.config.data.fim_rate:
        raise UserError(
            f"--suffix: {path} was trained without data.fim_rate and cannot fill in the middle; "
            "leave --suffix out"
        )
    model = metadata.config.model
    if arguments.scan is not None:
        model = with_scan(model, arguments.scan)
    resolve_scan(model, matmul_dtype(model))  # before a large checkpoint is read
    generate_text(
        checkpoint.restore_params(path),
        model,
        load_saved(path, metadata.config.data.tokenizer),
        prompts,
        suffix=arguments.suffix,
        on_text=InOrder(prompts, arguments.suffix or ""),
        **settings,
    )


class InOrder:
    """Prints prompts and their texts in order: the first that is not complete as it comes."""

    def __init__(self, prompts: list[str], suffix: str = ""):
        """Args:
        prompts: come before their texts.
        suffix: comes after each.
        """
        self._prompts, self._suffix = prompts, suffix
        self._waiting = [""] * len(prompts)
        self._complete = [False] * len(prompts)
        self._current = -1
        self._begin_next()

    def __call__(self, index: int, text: str | None) -> None:
        self._waiting[index] += text or ""
        self._complete[index] = text is None
        while self._current < len(self._prompts):
            print(self._waiting[self._current], end="", flush=True)
            self._waiting[self._current] = ""
            if not self._complete[self._current]:
                break
            print(self._suffix, flush=True)
            self._begin_next()

    def _begin_next(self) -> None:
        self._current += 1
        n_prompts = len(self._prompts)
        if self._current == n_prompts:
            return
        if n_prompts > 1:
            separator = "\n" if self._current else ""
            print(f"{separator}==> {self._current + 1} of {n_prompts} <==")
        print(self._prompts[self._current], end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
