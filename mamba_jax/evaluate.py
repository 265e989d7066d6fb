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
from typing import TYPE_CHECKING, Any

from mamba_jax.errors import UserError, command
from mamba_jax.tables import print_table

if TYPE_CHECKING:
    from mamba_jax.evaluating.scorer import Model, Scorer

Result = dict[str, Any]
_PROBLEMS = 200


@command
def main(argv: list[str]) -> int:
    """Runs the command; 130 after Ctrl-C."""
    arguments = parse(argv)
    try:
        run(arguments)
    except KeyboardInterrupt:
        return 130
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax evaluate",
        description="Measure a trained model, or several as an ensemble, on text and on tasks.",
    )
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a step_N or final folder, or a run's output_dir: its newest intact checkpoint",
    )
    models.add_argument(
        "--ensemble",
        nargs="+",
        metavar="DIR",
        help="several such, with one tokenizer: the mean of their probabilities is measured",
    )
    parser.add_argument(
        "--data",
        metavar="PATH|ID",
        help="a file, a folder, or a dataset of the Hugging Face Hub",
    )
    parser.add_argument("--split", default="test", help="of the dataset (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="built-in tasks with a difficulty, such as arithmetic:2 or recall:4-8, and tasks of "
        "lm_eval, such as gsm8k (pip install 'mamba_jax[eval]')",
    )
    parser.add_argument("--task_dir", metavar="DIR", help="with task files (.yaml) of your own")
    for name, type_, default, about in (
        ("--limit", int, None, "documents, or problems of each task, at most; built-in: 200"),
        ("--num_fewshot", int, None, "solved examples before a problem; default: the task's"),
        ("--batch_size", int, 8, "sequences at a time"),
        ("--chunk_tokens", int, 256, "read at a time; the state carries over, so only speed and "
         "memory depend on it"),
        ("--seed", int, 0, "of the confidence intervals"),
        ("--samples", int, 3, "problems of each task to show with their answers"),
    ):  # fmt: skip
        about += "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, type=type_, default=default, help=about)
    parser.add_argument("--json", metavar="FILE", help="write all results there")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Loads the models, measures them, prints a table and writes the JSON file.

    Raises:
      UserError: if nothing was asked, or something cannot be had.
    """
    if not (arguments.data or arguments.tasks):
        raise UserError("nothing to measure: give --data PATH or --tasks NAME")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"limit={arguments.limit} must be at least 1")
    from mamba_jax.evaluating.scorer import Scorer

    log = lambda line: print(line, file=sys.stderr)
    folders = arguments.ensemble or [arguments.checkpoint]
    models, names = zip(*(load(folder, log) for folder in folders), strict=True)
    scorer = Scorer(models, batch_size=arguments.batch_size, chunk_tokens=arguments.chunk_tokens)
    result: Result = {"checkpoints": names, "combined": _combined(len(names)), "metrics": []}
    if arguments.data:
        result["metrics"] += on_text(scorer, arguments, log)
    if arguments.tasks:
        metrics, result["samples"] = on_tasks(scorer, arguments)
        result["metrics"] += metrics
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    show(result)


def load(folder: str, log: Any) -> tuple["Model", str]:
    """Reads a checkpoint; returns it and what to call it."""
    from mamba_jax.data.tokenizer import load_saved
    from mamba_jax.evaluating.scorer import Model
    from mamba_jax.training import checkpoint

    path = checkpoint.resolve(folder, log)
    metadata = checkpoint.read_metadata(path)
    log(f"{path}: {metadata.config.name}, step {metadata.step}")
    tokenizer = load_saved(path, metadata.config.data.tokenizer)
    return Model(checkpoint.restore_params(path), metadata.config.model, tokenizer), str(path)


def on_text(scorer: "Scorer", arguments: argparse.Namespace, log: Any) -> list[Result]:
    """Measures perplexity and bits per byte."""
    from mamba_jax.evaluating import perplexity

    texts = perplexity.documents(arguments.data, arguments.split, log)
    texts = itertools.islice(texts, arguments.limit)
    measured = perplexity.measure(scorer, texts, arguments.batch_size)
    if not math.isfinite(measured.nlls.sum()):
        raise UserError("the model's probabilities are not finite: its training diverged")
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
            "variant": f"{variants[name]}, whole documents, end marker not scored; "
            "95% bootstrap over documents",
            **values,
            **n,
        }
        for name, values in summary.items()
    ]


def on_tasks(scorer: "Scorer", arguments: argparse.Namespace) -> tuple[list[Result], list[Result]]:
    """Answers built-in tasks, named with a difficulty, and those of lm_eval."""
    from mamba_jax.data.tasks import TASKS, parse
    from mamba_jax.evaluating import lm_eval_tasks, tasks

    names = [name.strip() for name in arguments.tasks.split(",")]
    builtin = [name for name in names if ":" in name or name in TASKS]
    metrics, samples = [], []
    if builtin:
        parse(spec := ",".join(builtin))  # before anything slow
        count = arguments.limit or _PROBLEMS
        metrics, samples = tasks.on_problems(scorer, spec, count, arguments.samples)
    if others := [name for name in names if name not in builtin]:
        more_metrics, more_samples = lm_eval_tasks.on_tasks(
            scorer,
            others,
            task_dir=arguments.task_dir,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            n_samples=arguments.samples,
        )
        metrics, samples = metrics + more_metrics, samples + more_samples
    return metrics, samples


def show(result: Result) -> None:
    """Prints samples, then the table."""
    for sample in result.get("samples", []):
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
