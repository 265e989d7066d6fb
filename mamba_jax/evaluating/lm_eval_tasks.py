"""Runs tasks of lm_eval with our models; needs the extra eval, but not torch.

Tokens are split as in lm_eval's own models: white space at the end of a context belongs to the
continuation, and a text's first token is predicted from the document separator. A context is never
truncated: the size of the recurrent state does not depend on the length.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mamba_jax.errors import UserError, did_you_mean, first_line, need
from mamba_jax.evaluating.scorer import Scorer, continue_texts

_MAX_NEW_TOKENS = 256  # if a task has no limit; lm_eval's own default
Result = dict[str, Any]


def find(tasks: Sequence[str], task_dir: str | None) -> Any:
    """Returns a ``lm_eval.tasks.TaskManager`` that knows the tasks.

    Args:
      tasks: names, of groups and patterns as well.
      task_dir: a folder with further task files.

    Raises:
      UserError: if lm_eval is not installed, a task unknown, or the folder not there.
    """
    manager_class = need("lm_eval.tasks", "eval").TaskManager
    if task_dir is not None and not os.path.isdir(task_dir):
        raise UserError(f"task_dir={task_dir} is not a folder; give one with task files (.yaml)")
    manager = manager_class(include_path=task_dir)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = did_you_mean(task, manager.all_tasks)
            raise UserError(f'unknown task "{task}"{near} (run lm_eval ls tasks for a list)')
    return manager


def on_tasks(
    scorer: Scorer,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None,
    num_fewshot: int | None,
    n_samples: int,
) -> tuple[list[Result], list[Result]]:
    """Runs tasks of ``find``; returns their metrics and some samples with the model's answers.

    Raises:
      UserError: if the data of a task is not available, or its file is invalid.
    """
    lm_eval = need("lm_eval", "eval")
    try:
        results = lm_eval.simple_evaluate(
            model=language_model(scorer),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=True,
        )
    except (OSError, ValueError) as error:  # no network is a ConnectionError, no file an OSError
        raise UserError(f"cannot run {','.join(tasks)}: {first_line(error)}") from error
    assert results is not None
    return _metrics(results), _samples(results["samples"], n_samples)


def _metrics(results: Result) -> list[Result]:
    """Returns each metric with its filter, few-shot count and normal 95% interval."""
    metrics = []
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, used_filter = key.partition(",")
            is_number = isinstance(value, int | float | np.number)
            if not used_filter or name.endswith("_stderr") or not is_number:
                continue
            error = values.get(f"{name}_stderr,{used_filter}")
            known = isinstance(error, int | float)  # else "N/A"
            shots = results["n-shot"].get(task, 0)
            metrics.append(
                {
                    "of": task,
                    "metric": name,
                    "variant": f"lm_eval, version {results['versions'].get(task)}, "
                    f"{shots}-shot, filter {used_filter}; 95% normal, of its standard error",
                    "value": float(value),
                    "low": float(value - 1.96 * error) if known else None,
                    "high": float(value + 1.96 * error) if known else None,
                }
            )
    return metrics


def _samples(samples: dict[str, list[Result]], n_samples: int) -> list[Result]:
    return [
        {
            "task": task,
            "prompt": str(sample["arguments"][0][0]),
            "answer": str(sample["filtered_resps"]),
            "target": str(sample["target"]),
        }
        for task, of_task in samples.items()
        for sample in of_task[:n_samples]
    ]


def language_model(scorer: Scorer) -> Any:
    """Returns the ``lm_eval.api.model.LM`` that answers with the scorer's models."""
    base: Any = need("lm_eval.api.model", "eval").LM

    class OurModel(base):
        """Each method takes lm_eval's requests and answers in their order."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return by_task(requests, lambda pairs: loglikelihoods(scorer, pairs))

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [request.args[0] for request in requests]
            return [total for total, _ in loglikelihoods(scorer, [("", text) for text in texts])]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return by_task(requests, lambda given: generate(scorer, given))

    return OurModel()


def by_task(requests: list[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Answers requests in their order, but each task's together: they share a prefix, such as the
    same solved examples, which the scorer then prefills once."""
    answers: list[Any] = [None] * len(requests)
    for task in dict.fromkeys(request.task_name for request in requests):
        mine = [i for i, request in enumerate(requests) if request.task_name == task]
        for i, found in zip(mine, answer([requests[i].args for i in mine]), strict=True):
            answers[i] = found
    return answers


def loglikelihoods(scorer: Scorer, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Returns, for each (context, continuation), the continuation's ln probability, and whether
    each of its tokens was the most likely."""
    sequences, starts = [], []
    for context, continuation in pairs:
        before, whole = encode_pair(scorer, context, continuation)
        sequences.append(whole)
        starts.append(before)
    return [
        (-float(scores.nlls.sum()), bool(scores.greedy.all()))
        for scores in scorer.scores(sequences, starts)
    ]


def encode_pair(scorer: Scorer, context: str, continuation: str) -> tuple[int, np.ndarray]:
    """Returns the number of tokens before the continuation, separator included, and all tokens.

    A token that spans the border belongs to the context, as in lm_eval's own models, except that
    the last token always belongs to the continuation.
    """
    encode = scorer.tokenizer.encode
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    begin = np.array([scorer.tokenizer.eot_id], np.int32)
    whole = np.concatenate([begin, encode(stripped + continuation)]).astype(np.int32)
    at_most = len(whole) - 1 if continuation else len(whole)
    return max(1, min(len(encode(stripped)) + 1, at_most)), whole


def generate(scorer: Scorer, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Returns greedy continuations of (context, settings), each up to the first of its
    ``settings["until"]``.

    Raises:
      UserError: if the task samples its answers.
    """
    texts = [""] * len(requests)
    # Requests of one task share their settings; each setting is answered on its own.
    for settings in {repr(settings): settings for _, settings in requests}.values():
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise UserError(
                "this task samples its answers, which is not supported; choose a task with "
                "greedy answers"
            )
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limit = int(settings.get("max_gen_toks", settings.get("max_tokens", _MAX_NEW_TOKENS)))
        mine = [i for i, (_, other) in enumerate(requests) if other == settings]
        found = continue_texts(scorer, [requests[i][0] for i in mine], limit, stops)
        for i, text in zip(mine, found, strict=True):
            texts[i] = text
    return texts
