"""Measures trained models: perplexity and bits per byte of text, and tasks of lm_eval.

python -m mamba_jax.evaluate --checkpoint checkpoints/quickstart --data book.txt
python -m mamba_jax.evaluate --ensemble RUN_1 RUN_2 RUN_3 --data book.txt --json result.json
python -m mamba_jax.evaluate --checkpoint DIR --tasks arithmetic:1-3,gsm8k
"""

import argparse
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mamba_jax.cli.flags import add_inference, add_models, chosen
from mamba_jax.cli.terminal import print_table
from mamba_jax.errors import UserError, command
from mamba_jax.files import write_atomic

if TYPE_CHECKING:
    from mamba_jax.evaluating.scorer import Scorer

Result = dict[str, Any]
Answer = Callable[["Scorer"], tuple[list[Result], list[Result]]]
_PROBLEMS = 200


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    arguments = parse(argv)
    run(arguments)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax evaluate",
        description="Measure a trained model, or several as an ensemble, on text and on tasks.",
    )
    add_models(parser, "measure the mean of their probabilities")
    parser.add_argument(
        "--data",
        metavar="PATH|ID",
        help="a file, a folder, or a dataset of the Hugging Face Hub",
    )
    parser.add_argument(
        "--split", default="test", help="split of the dataset (default: %(default)s)"
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="built-in tasks with a difficulty, such as arithmetic:2 or recall:4-8, and lm_eval "
        "tasks such as gsm8k (pip install 'mamba_jax[eval]')",
    )
    parser.add_argument(
        "--task_dir", metavar="DIR", help="a folder with your own task files (.yaml)"
    )
    for name, type_, default, about in (
        ("--limit", int, None, "use at most N documents, or N problems of each task (default "
         "for built-in tasks: 200)"),
        ("--num_fewshot", int, None, "solved examples before each lm_eval problem; default: the "
         "task's own"),
        ("--batch_size", int, 8, "sequences per batch"),
        ("--chunk_tokens", int, 256, "tokens per chunk; the state carries over, so only speed and "
         "memory depend on it"),
        ("--seed", int, 0, "random seed of the confidence intervals"),
        ("--samples", int, 3, "problems of each task to print with their answers"),
    ):  # fmt: skip
        about += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=type_, default=default, help=about)
    add_inference(parser)
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Loads the models, measures them, prints a table and writes the JSON file.

    Raises:
      UserError: if there is nothing to measure, or data or a model is missing.
    """
    check(arguments)
    from mamba_jax.evaluating.scorer import Scorer
    from mamba_jax.generation.load import find

    answers = find_tasks(arguments) if arguments.tasks else []
    log = lambda line: print(line, file=sys.stderr)
    found = [find(folder, log) for folder in arguments.ensemble or [arguments.checkpoint]]
    names = [str(each.path) for each in found]
    models = [each.load(**chosen(arguments)) for each in found]
    scorer = Scorer(models, batch_size=arguments.batch_size, chunk_tokens=arguments.chunk_tokens)
    result: Result = {"checkpoints": names, "combined": _combined(len(names)), "metrics": []}
    result["samples"] = []
    if arguments.data:
        result["metrics"] += on_text(scorer, arguments, log)
    for answer in answers:
        metrics, samples = answer(scorer)
        result["metrics"] += metrics
        result["samples"] += samples
    try:
        if arguments.json:
            write(arguments.json, result)
    finally:  # a full disk must not discard the results
        show(result)


def check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot work before anything slow starts.

    Raises:
      UserError: see its text.
      OSError: if the JSON file cannot be written.
    """
    if not (arguments.data or arguments.tasks):
        raise UserError("nothing to measure; give --data PATH or --tasks NAME")
    for name, least in (("limit", 1), ("num_fewshot", 0), ("seed", 0), ("samples", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    if arguments.json:
        file = pathlib.Path(arguments.json)
        is_new = not file.exists()
        with open(file, "a"):  # changes nothing
            pass
        if is_new:
            file.unlink()


def write(file: str, result: Result) -> None:
    """Writes JSON; NaN and infinity become null, because JSON has no numbers for them.

    Raises:
      UserError: if the disk is full.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(plain(result), indent=2, allow_nan=False) + "\n"
    try:
        write_atomic(file, text)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def on_text(scorer: "Scorer", arguments: argparse.Namespace, log: Any) -> list[Result]:
    """Measures perplexity and bits per byte."""
    from mamba_jax.evaluating import perplexity

    texts = perplexity.documents(arguments.data, arguments.split, log)
    texts = itertools.islice(texts, arguments.limit)
    measured = perplexity.measure(scorer, texts, arguments.batch_size)
    n = {"documents": len(measured.nlls), "tokens": int(measured.tokens.sum())}
    n["text_bytes"] = int(measured.text_bytes.sum())
    log(f"{n['documents']:,} documents, {n['tokens']:,} tokens, {n['text_bytes']:,} bytes")
    summary = perplexity.summarise(measured, arguments.seed)
    variants = {
        "perplexity": f"per token of {scorer.tokenizer.name}",
        "bits_per_byte": "per UTF-8 byte",
    }
    return [
        {
            "of": arguments.data,
            "metric": name,
            "variant": f"{variants[name]}, whole documents, separator not scored; "
            "95% bootstrap over documents",
            **values,
            **n,
        }
        for name, values in summary.items()
    ]


def find_tasks(arguments: argparse.Namespace) -> list[Answer]:
    """Looks for built-in tasks, named with a difficulty, and those of lm_eval.

    Returns:
      Functions that answer them and return metrics and samples.

    Raises:
      UserError: if there is no such task, or lm_eval is needed and not installed.
    """
    from mamba_jax.data.tasks import TASKS, parse
    from mamba_jax.evaluating import lm_eval_tasks, tasks

    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise UserError(
            f'--tasks "{arguments.tasks}" names no task; give some, such as recall:2 or gsm8k'
        )
    builtin = [name for name in names if ":" in name or name in TASKS]
    others = [name for name in names if name not in builtin]
    answers: list[Answer] = []
    if builtin:
        parse(spec := ",".join(builtin))
        count = arguments.limit or _PROBLEMS
        answers.append(lambda scorer: tasks.on_problems(scorer, spec, count, arguments.samples))
    if others:
        manager = lm_eval_tasks.find(others, arguments.task_dir)
        answers.append(
            lambda scorer: lm_eval_tasks.on_tasks(
                scorer,
                others,
                manager,
                limit=arguments.limit,
                num_fewshot=arguments.num_fewshot,
                n_samples=arguments.samples,
            )
        )
    return answers


def show(result: Result) -> None:
    """Prints samples, then the table."""
    for sample in result["samples"]:
        print(f"--- {sample['task']}\n{sample['prompt']}\n>>> {sample['answer'].strip()}")
        print(f"    expected: {sample['target']}\n")
    rows = []
    for metric in result["metrics"]:
        ends = metric["low"], metric["high"]
        between = "-" if None in ends else f"{ends[0]:.4f} … {ends[1]:.4f}"
        name = metric["of"], metric["metric"], metric["variant"]
        rows.append([*name, f"{metric['value']:.4f}", between])
    print_table(["of", "metric", "variant", "value", "95% interval"], rows, 3)


def _combined(n_models: int) -> str:
    return "one model" if n_models == 1 else f"mean of the probabilities of {n_models} models"


if __name__ == "__main__":
    sys.exit(main())
