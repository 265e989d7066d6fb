"""No program is compiled twice for the same shapes, with checkpoints read from the disk."""

import collections
import dataclasses

import pytest

from mamba_jax.evaluating import lm_eval_tasks
from mamba_jax.evaluating.scorer import Scorer, continue_texts
from mamba_jax.generation import Conversation, Sampling, generate_text
from mamba_jax.generation.load import find
from tests.support.compilations import programs
from tests.support.made import write_checkpoint
from tests.support.tiny_models import CONFIGS, TOKENIZER, model_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

SETTINGS = {"max_tokens": 20, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "seed": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Both families, loaded; their epsilon is nobody else's, so that nothing is compiled yet."""
    loaded = []
    for family, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(family)
        config = dataclasses.replace(config, norm_eps=7e-4)
        write_checkpoint(folder, config, model_of(family).params)
        loaded.append(find(str(folder), lambda line: None).load())
    return loaded


def _generate(models, **more):
    model, *others = models
    prompts = ["a", "b" * 1030]  # several pieces
    generate_text(model.params, model.config, TOKENIZER, prompts, others=others, **SETTINGS, **more)


def _converse(models):
    model, *others = models
    conversation = Conversation(
        model.params,
        model.config,
        TOKENIZER,
        sampling=Sampling(0.7),
        max_tokens=3,
        others=others,
    )
    for _ in range(2):
        for turn in ("a" * 17, "b" * 140, "c" * 140):
            collections.deque(conversation.say(turn))
        conversation.reset()


def _score(models):
    pairs = [("some " + "a" * i + str(i), "answers"[: i + 1]) for i in range(7)]
    lm_eval_tasks.loglikelihoods(Scorer(models, batch_size=2, chunk_tokens=4), pairs)


def _continue(models):
    contexts = [f"begun{'so' * i}{i}" for i in range(5)]
    continue_texts(Scorer(models, batch_size=2, chunk_tokens=4), contexts, 5, ["none"])


USES = {
    "a batch": (_generate, 1),
    "a stream": (lambda models: _generate(models, on_text=lambda *_: None), 1),
    "a stream of an ensemble": (lambda models: _generate(models, on_text=lambda *_: None), 2),
    "a conversation": (_converse, 1),
    "a conversation with an ensemble": (_converse, 2),
    "scores": (_score, 1),
    "continuations": (_continue, 2),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_is_compiled_twice(use, models):
    run, n_models = USES[use]
    with programs() as compiled:
        run(models[:n_models])
    assert compiled
    twice = [program for program, count in collections.Counter(compiled).items() if count > 1]
    assert not twice
    with programs() as compiled:
        run(models[:n_models])
    assert not compiled
