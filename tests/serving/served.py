"""A server over the tiny Mamba, and a minimal client."""

import contextlib
import http.client
import json
import socket
import threading
import time

import uvicorn

from mamba_jax.serving.api import make_app
from mamba_jax.serving.engine import Engine
from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.request_parser import Limits, RequestParser
from tests.support.tiny_models import TOKENIZER, model_of

_LIMITS = Limits(prompt_tokens=400, max_tokens=100_000)


@contextlib.contextmanager
def running(app, is_ready=lambda: True):
    """Runs an application on a free port; gives the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until(lambda: server.started and is_ready())
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def serving(*, max_queue=40, **settings):
    """Serves the tiny Mamba; gives the port."""
    model, metrics = model_of("mamba"), Metrics()
    engine = Engine(
        model,
        max_batch=4,
        max_queue=max_queue,
        observer=metrics,
    )
    engine.start(warm_up=False)
    app = make_app(
        engine,
        RequestParser(TOKENIZER, _LIMITS, fills_in=False),
        metrics,
        model_name="tiny",
        on_stop=engine.close,
        **settings,
    )
    with running(app, engine.ready.is_set) as port:
        yield port


def request(port, method, path, body=None, headers=()):
    """Returns status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {"Content-Type": "application/json"} | dict(headers))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def post(port, path, body, **more):
    status, _, content = request(port, "POST", path, body, **more)
    return status, json.loads(content)


def metric(port, name):
    _, _, content = request(port, "GET", "/metrics")
    lines = [line for line in content.decode().splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[1]) if lines else 0.0  # a label that was never counted


def until(condition, secs=60):
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
