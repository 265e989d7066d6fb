"""``python -m mamba_jax.prepare_data``: tokenises a corpus ahead of training, and tells about it.

It takes the flags of ``train``; a run with the same ones starts at once. Stopped or killed, the
same command goes on where it stopped.
"""

import argparse
import itertools
import sys

from mamba_jax.cli import train_arguments
from mamba_jax.cli.terminal import has_colours
from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError, command

_INSPECTED = 3


def run(config: RunConfig) -> None:
    """Tokenises what is not in the cache, and prints what there is.

    Raises:
      UserError: if there is no text, or the cache cannot be used.
    """
    from mamba_jax.data.cache import store
    from mamba_jax.data.pipeline import tokenise

    data = config.data
    *_, plan = tokenise(data, seq_len=config.model.max_seq_len, seed=config.seed, log=_say)
    summary = plan.summary
    own_tokens = summary.tokens - summary.documents  # without the separators
    print(
        f"{summary.text_bytes / own_tokens:.3f} bytes per token ({data.tokenizer}); "
        f"{summary.duplicates:,} exact and {summary.near_duplicates:,} near duplicates\n"
        f"token cache: {store.size_bytes(data.cache_root) / 1e6:,.2f} MB in "
        f"{store.cache_folder(data.cache_root)} (--clear_cache removes it)"
    )


def inspect(config: RunConfig, count: int) -> None:
    """Prints the windows that a run with this config begins with.

    Raises:
      UserError: as ``run``; and if the text is too little for a run.
    """
    from mamba_jax.data.pipeline import prepare
    from mamba_jax.data.show import count_separators, show_window

    corpus = prepare(config.data, seq_len=config.model.max_seq_len, seed=config.seed, log=_say)
    tokenizer = corpus.tokenizer
    names = {token: name for name, token in tokenizer.special_ids.items()}
    if corpus.fill:
        names |= dict(zip(tokenizer.fim_ids, ("prefix", "suffix", "middle"), strict=True))
    colour = has_colours(sys.stdout)
    batches = corpus.train_batches(config.vram.effective_batch_size, config.seed)
    windows = itertools.islice(itertools.chain.from_iterable(batches), count)
    for number, window in enumerate(windows, 1):
        print(
            f"\n==> window {number} of a training: {len(window) - 1:,} targets, "
            f"{int((window[1:] < 0).sum()):,} of them not trained on; "
            f"{count_separators(window, tokenizer.eot_id):,} documents begin <=="
        )
        print(show_window(window, tokenizer, names, colour=colour))


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> train_arguments.Parser:
    parser = train_arguments.Parser(
        prog="mamba_jax.prepare_data",
        usage="%(prog)s [flags]",
        description="Tokenises a corpus ahead of training, and tells about it. Stopped or killed, "
        "the same command goes on where it stopped.",
        epilog="and those of mamba_jax.train, which --config FILE and --config.data.FIELD= belong "
        "to: give here what the run will be given",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        help="processes; default data.tokenise_workers: as many as there are processors and the "
        "text is worth",
    )
    parser.add_argument(
        "--inspect",
        metavar="N",
        nargs="?",
        help=f"show the first N windows of a training as text (default {_INSPECTED}): where "
        "documents begin, what is not trained on, in colours on a terminal unless NO_COLOR is set",
    )
    train_arguments.add_data_flags(parser)
    return parser


@command
def main(argv: list[str]) -> int:
    """The command: reads ``argv``, returns the exit status."""
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return 0
    count, rest = _take_inspect(_take_workers(argv))
    asked = train_arguments.read(rest)
    if asked.resume or asked.profile or asked.dry_run:
        raise UserError("--resume, --profile and --dry_run have no use where nothing is trained")
    from mamba_jax.data.listing import clear_cache, list_files

    if asked.clear_cache:
        clear_cache(asked.config.data, _say)
    if asked.list_files:
        list_files(asked.config.data, _say)
        return 0
    try:
        if count:
            inspect(asked.config, count)
        else:
            run(asked.config)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _take_inspect(argv: list[str]) -> tuple[int, list[str]]:
    """Returns the number of ``--inspect``, 0 without it, and the other words.

    Raises:
      UserError: if it is no number from 1 up.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--inspect", nargs="?", const=str(_INSPECTED), default=None)
    found, rest = parser.parse_known_args(argv)
    if found.inspect is None:
        return 0, rest
    if not found.inspect.isdecimal() or not int(found.inspect):
        raise UserError(f"--inspect={found.inspect}: give a number of windows from 1 up")
    return int(found.inspect), rest


def _take_workers(argv: list[str]) -> list[str]:
    """Writes ``--workers N`` as the field that it sets."""
    field = "--config.data.tokenise_workers"
    named = [word.replace("--workers=", f"{field}=", 1) for word in argv]
    return [field if word == "--workers" else word for word in named]


if __name__ == "__main__":
    sys.exit(main())
