"""``python -m mamba_jax.prepare_data``: tokenises a corpus before training and reports statistics.

It takes the flags of ``train``; a run with the same flags then starts at once. After an
interruption, the same command resumes where it stopped.
"""

import argparse
import itertools
import sys

from mamba_jax.cli import train_arguments, train_flags
from mamba_jax.cli.terminal import has_colours
from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError, command

_INSPECTED = 3


def run(config: RunConfig) -> None:
    """Tokenises what is not in the cache, and prints the statistics of the corpus.

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
    """Prints the first training windows of a run with this config.

    Raises:
      UserError: as ``run``; and if there is too little text for a run.
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
            f"\n==> training window {number}: {len(window) - 1:,} tokens to predict, "
            f"{int((window[1:] < 0).sum()):,} of them not trained on; "
            f"{count_separators(window, tokenizer.eot_id):,} documents begin <=="
        )
        print(show_window(window, tokenizer, names, colour=colour))


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> train_flags.Parser:
    parser = train_flags.Parser(
        prog="mamba_jax.prepare_data",
        usage="%(prog)s [flags]",
        description="Tokenises a corpus before training and reports statistics. After an "
        "interruption, run the same command again: it resumes where it stopped.",
        epilog="The flags of mamba_jax.train, such as --config FILE and --config.data.FIELD=, work "
        "here too: give the same ones as for the run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        help="number of tokenising processes (default: data.tokenise_workers, by default one per "
        "processor, and fewer for little text)",
    )
    parser.add_argument(
        "--inspect",
        metavar="N",
        nargs="?",
        help=f"show the first N training windows as text (default {_INSPECTED}), with the starts "
        "of documents and the text that is not trained on; in colour on a terminal unless NO_COLOR "
        "is set",
    )
    train_flags.add_data_flags(parser)
    return parser


@command
def main(argv: list[str]) -> int:
    """The command: reads ``argv``, returns the exit status."""
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return 0
    count, rest = _take_inspect(_take_workers(argv))
    arguments = train_arguments.read(rest)
    if arguments.resume or arguments.profile or arguments.dry_run:
        raise UserError(
            "--resume, --profile and --dry_run do not apply: prepare_data does not train"
        )
    from mamba_jax.data.listing import clear_cache, list_files

    if arguments.clear_cache:
        clear_cache(arguments.config.data, _say)
    if arguments.list_files:
        list_files(arguments.config.data, _say)
        return 0
    try:
        if count:
            inspect(arguments.config, count)
        else:
            run(arguments.config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again to resume") from None
    return 0


def _take_inspect(argv: list[str]) -> tuple[int, list[str]]:
    """Returns the number given with ``--inspect``, 0 without it, and the other arguments.

    Raises:
      UserError: if it is not a number of at least 1.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--inspect", nargs="?", const=str(_INSPECTED), default=None)
    found, rest = parser.parse_known_args(argv)
    if found.inspect is None:
        return 0, rest
    if not found.inspect.isdecimal() or not int(found.inspect):
        raise UserError(f"--inspect={found.inspect}: give a number of windows, 1 or more")
    return int(found.inspect), rest


def _take_workers(argv: list[str]) -> list[str]:
    """Replaces ``--workers N`` by the config field that it sets."""
    field = "--config.data.tokenise_workers"
    named = [word.replace("--workers=", f"{field}=", 1) for word in argv]
    return [field if word == "--workers" else word for word in named]


if __name__ == "__main__":
    sys.exit(main())
