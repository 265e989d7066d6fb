"""Engines over tiny models, and a way to wait for their events."""

import threading

import numpy as np
import pytest

from mamba_jax.generation import generate_text
from mamba_jax.serving import engine as engines
from mamba_jax.serving.sequence import End, Failed, GenerationRequest, Text
from tests.support.tiny_models import TOKENIZER, model_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

from .served import until


def tokens_of(prompt):
    return np.concatenate([[TOKENIZER.eot_id], TOKENIZER.encode(prompt)]).astype(np.int32)


def request_of(prompt, max_tokens=12, **more):
    return GenerationRequest(tokens_of(prompt), max_tokens, **more)


class Listener:
    """Collects the events of several requests."""

    def __init__(self, count):
        self.events = [[] for _ in range(count)]
        self._open = count
        self._done = threading.Event()

    def __call__(self, index, event):
        self.events[index].append(event)
        if isinstance(event, End | Failed):
            self._open -= 1
            if not self._open:
                self._done.set()

    def wait(self):
        assert self._done.wait(120), "the engine does not answer"
        return self.events


def answers(engine, *requests):
    """Submits requests together; returns (text, last event) of each."""
    listener = Listener(len(requests))
    engine.submit(list(requests), listener)
    return [
        ("".join(event.text for event in events if isinstance(event, Text)), events[-1])
        for events in listener.wait()
    ]


def offline(family, prompt, max_tokens=12):
    """The greedy output of the generate command."""
    model = model_of(family)
    settings = {"max_tokens": max_tokens, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    return generate_text(model.params, model.config, TOKENIZER, [prompt], **settings)[0]


def engine_of(family, **settings):
    model = model_of(family)
    made = engines.Engine(model, **{"max_batch": 4, "max_queue": 40} | settings)
    made.start(warm_up=False)
    return made


def wait_until_idle(engine):
    """Waits until an engine's thread is idle, so that all work after an answer is done, too."""
    until(lambda: engine._changed._waiters)


@pytest.fixture(scope="module")
def engine():
    made = engine_of("mamba")
    yield made
    made.close()
