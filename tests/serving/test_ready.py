"""A server that loads its checkpoint from the disk: what it reports until it is ready, and that it
compiles nothing afterwards."""

import dataclasses
import http.client
import json
import threading

import pytest

from mamba_jax.checkpoints.arrays import CheckpointWriter
from mamba_jax.serving.server import open_app
from mamba_jax.serving.settings import Settings
from mamba_jax.serving.warm_up import WarmUp
from tests.support.compilations import compilations
from tests.support.made import metadata_of, random_params
from tests.support.tiny_models import CONFIGS
from tests.support.tiny_run import quick_compiles  # noqa: F401

from .served import metric, post, request, running, until

MAX_BATCH = 3
CHAT = "/v1/chat/completions"


# With shapes that no other test has, so that nothing is compiled yet.
CONFIG = dataclasses.replace(CONFIGS["mamba"], d_conv=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    metadata = metadata_of(CONFIG, tokenizer="bytes", fim_rate=0.5)
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=lambda line: None) as writer:
        writer.save("final", {"params": random_params(CONFIG), "step": 3}, metadata)
    return folder


def _prompt(n_tokens, first=0):
    return [(first + i * i) % 256 for i in range(n_tokens)]


def _ask_everything(port):
    """Requests of every kind, with a prompt of every chunk length and of several chunks."""
    ask = lambda path="/v1/completions", **body: post(port, path, {"max_tokens": 5} | body)
    for i, n_tokens in enumerate((1, 3, 14, 15, 16, 31, 62, 100, 255, 256, 300, 380)):
        yield ask(prompt=_prompt(n_tokens, 7 * i), temperature=0)
        yield ask(prompt=_prompt(n_tokens, 7 * i), echo=True, logprobs=3, max_tokens=i % 2)
    for n_more in (1, 2, 4, 7, 21, 90):  # behind what is kept of the last of these
        yield ask(prompt=_prompt(380, 77)[:300] + _prompt(n_more, 5))
    yield ask(prompt=["a", "bc", "def", "g"], n=3, seed=4, top_p=0.9, max_tokens=40)
    yield ask(prompt="x", temperature=0.5, top_k=3, stop=["q", "zz"], logprobs=0)
    yield ask(prompt="def f(", suffix="return", max_tokens=9)
    yield ask("/generate", prompt="On and on", max_tokens=60)
    messages = []
    for turn in ("Who are you?", "And what is the time over there?"):
        messages.append({"role": "user", "content": turn})
        status, answer = ask(CHAT, messages=messages, temperature=0, max_tokens=40)
        yield status, answer
        messages.append(answer["choices"][0]["message"])


def _leave(port):
    """Requests a stream and disconnects."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "On and on", "max_tokens": 4_000, "temperature": 0, "stream": True}
    client.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    client.getresponse().read(10)
    client.close()
    until(lambda: metric(port, "mamba_jax_generations_decoding") == 0)


def test_it_reports_when_it_is_ready_and_compiles_nothing_afterwards(folder, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # which would leave nothing to count
    may_begin, run, said = threading.Event(), WarmUp.run, []
    monkeypatch.setattr(
        WarmUp, "run", lambda warm_up, is_over: (may_begin.wait(60), run(warm_up, is_over))
    )
    settings = Settings(str(folder), max_batch=MAX_BATCH, max_prompt_tokens=400, max_queue=20)
    app = open_app(settings, said.append)
    with running(app) as port, compilations() as warming:
        status, headers, content = request(port, "GET", "/ready")
        progress = json.loads(content)
        assert (status, headers["Retry-After"]) == (503, "5")
        assert (progress["status"], progress["compiled"]) == ("warming up", 0)
        assert request(port, "GET", "/health")[0] == 200
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/completions", {"prompt": "a", "stream": True}),
            (CHAT, {"messages": [{"role": "user", "content": "a"}]}),
            ("/generate", {"prompt": "a"}),
        ):
            status, headers, content = request(port, "POST", path, body)
            assert (status, headers["Retry-After"]) == (503, "5")
            assert json.loads(content)["error"]["code"] == "warming_up"
        assert not warming
        may_begin.set()
        until(lambda: request(port, "GET", "/ready")[0] == 200, secs=300)
        progress = json.loads(request(port, "GET", "/ready")[2])
        assert (progress["status"], progress["compiled"]) == ("ready", progress["programs"])
        assert len(warming) == progress["programs"]  # each once
        assert metric(port, "mamba_jax_compiled_programs") == progress["programs"]
        assert metric(port, "mamba_jax_warm_up_seconds") > 0
        assert said[-1].startswith(f"ready: compiled {progress['programs']} programs in ")
        with compilations() as compiled:
            for status, answer in _ask_everything(port):
                assert status == 200, answer
            _leave(port)
        assert not compiled
        assert metric(port, "mamba_jax_cached_prompt_tokens_total") > 0
