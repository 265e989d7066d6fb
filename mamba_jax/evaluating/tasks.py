"""The built-in tasks: problems with exact answers, from the held-out test split."""

from typing import Any

from mamba_jax.data.tasks import parse, problems
from mamba_jax.evaluating.scorer import Scorer, continue_texts

_SEED = 1  # chooses the problems; only the split keeps them apart from those of training
_SPARE_TOKENS = 8  # for a wrong answer that is longer
_Z = 1.959964  # standard deviations of 95%
Result = dict[str, Any]


def on_problems(
    scorer: Scorer, spec: str, count: int, n_samples: int
) -> tuple[list[Result], list[Result]]:
    """Measures each task and difficulty; returns the shares of solved problems, and samples.

    Args:
      scorer: the models.
      spec: as of ``data.tasks.parse``.
      count: problems of each, at most.
      n_samples: problems of each to return with their answers.

    Raises:
      UserError: on an unknown task or difficulty.
    """
    metrics, samples = [], []
    for name, difficulty in parse(spec):
        chosen = list(problems(name, difficulty, "test", _SEED, count))
        longest = max(len(scorer.tokenizer.encode(f" {problem.answer}")) for problem in chosen)
        prompts = [problem.prompt for problem in chosen]
        answers = continue_texts(scorer, prompts, longest + _SPARE_TOKENS, ["\n"])
        solved = [p.is_solved_by(a) for p, a in zip(chosen, answers, strict=True)]
        low, high = wilson(sum(solved), len(solved))
        task = f"{name}:{difficulty}"
        metrics.append(
            {
                "of": task,
                "metric": "exact",
                "variant": f"{len(chosen):,} test problems, no examples before them, greedy; "
                "95% Wilson",
                "value": sum(solved) / len(solved),
                "low": low,
                "high": high,
            }
        )
        samples += [
            {"task": task, "prompt": p.prompt, "answer": answer, "target": p.answer}
            for p, answer in zip(chosen[:n_samples], answers, strict=False)
        ]
    return metrics, samples


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Returns the ends of the 95% score interval of a share (Wilson 1927)."""
    share, z2 = successes / trials, _Z**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    inside = share * (1 - share) / trials + z2 / (4 * trials**2)
    half = _Z * inside**0.5 / (1 + z2 / trials)
    return max(middle - half, 0.0), min(middle + half, 1.0)
