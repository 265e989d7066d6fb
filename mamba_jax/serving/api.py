"""The server's paths: this project's ``/generate``, OpenAI's ``/v1/…``, and those that watch it."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mamba_jax.errors import UserError
from mamba_jax.serving.answers import Answer, GenerateAnswer, error
from mamba_jax.serving.engine import Closed, Engine, QueueFull, WarmingUp
from mamba_jax.serving.guard import Guard
from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.page import load_page
from mamba_jax.serving.protocol import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Translator,
    shown,
)
from mamba_jax.serving.sequence import Asked, End, Event, Failed

_FAILED = {"timeout": 504, "cancelled": 499, "stopping": 503, "error": 500}
_RETRY_SECS = 1
_WARM_UP_SECS = 5
_NO_JSON = "the body is not valid JSON: {}"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies: pass it on at once


class Unserved(Exception):
    """A request that the engine did not serve."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.failed = failed


def make_app(
    engine: Engine,
    translator: Translator,
    metrics: Metrics,
    *,
    model_name: str,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    max_body_bytes: int = 4 << 20,
    on_stop: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Makes the application; its ``state`` holds the engine.

    Args:
      engine: started by whoever calls.
      translator: of the engine's model.
      metrics: the engine's observer.
      model_name: what clients call the model.
      api_key: that clients must send; None: none.
      cors_origins: whose pages may ask from a browser.
      max_body_bytes: of a request.
      on_stop: is called when the server has stopped.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        on_stop()

    app = FastAPI(title="mamba_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes, metrics=metrics)
    if cors_origins:  # around the guard: browsers ask without the key first, and read its errors
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )
    app.state.engine = engine
    started = int(time.time())
    page = load_page()
    _answer_errors(app)

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page.text, headers=page.headers)

    @app.get("/health")
    async def health() -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 500)

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = engine.ready.is_set() and engine.alive
        warm_up = engine.warm_up
        progress = {
            "status": "ready" if is_ready else "warming up" if engine.alive else "stopped",
            "warm_up_secs": round(warm_up.secs, 1),
            "programs": warm_up.n_programs,
            "compiled": warm_up.n_compiled,
        }
        return _json(progress, 200) if is_ready else _json(progress, 503, _retry(_WARM_UP_SECS))

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(model_name, started)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, model_name)
        return _model(model_name, started)

    @app.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        _check_model(body.model, model_name)
        asked = await asyncio.to_thread(translator.generate, body)
        return await _respond(engine, asked, GenerateAnswer(), request, bool(body.stream))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(body.model, model_name)
        asked = await asyncio.to_thread(translator.completion, body)
        answer = Answer(
            "completion",
            model_name,
            engine.tokenizer,
            asked,
            echo=bool(body.echo),
        )
        return await _respond(engine, asked, answer, request, bool(body.stream), body.with_usage)

    @app.post("/v1/chat/completions")
    async def chats(body: ChatRequest, request: Request) -> Response:
        _check_model(body.model, model_name)
        asked = await asyncio.to_thread(translator.chat, body)
        answer = Answer("chat", model_name, engine.tokenizer, asked)
        return await _respond(engine, asked, answer, request, bool(body.stream), body.with_usage)

    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mamba_jax"}


def _check_model(asked: str | None, name: str) -> None:
    if asked is not None and asked != name:
        raise BadRequest(
            f"there is no model {asked!r} here; this is {name!r}", "model", "model_not_found", 404
        )


async def _respond(
    engine: Engine,
    asked: list[Asked],
    answer: Answer | GenerateAnswer,
    request: Request,
    stream: bool,
    usage: bool = False,
) -> Response:
    if not stream:
        events = await _all(engine, asked, request)
        # Not on the loop: with the log-probabilities of a long prompt it is megabytes.
        return await asyncio.to_thread(lambda: _json(answer.whole(events)))
    # Before the response begins: a full queue must still become a status.
    events = _submit(engine, asked, request)

    async def lines() -> AsyncIterator[bytes]:
        for chunk in answer.first():
            yield _line(chunk)
        async with contextlib.aclosing(events):
            async for choice, event in events:
                if isinstance(event, Failed):
                    yield _line(error(event.message, "server_error", code=event.reason))
                    return
                for chunk in answer.chunks(choice, event):
                    yield _line(chunk)
        if usage and isinstance(answer, Answer):
            yield _line(answer.usage_chunk())
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers=_HEADERS)


async def _all(engine: Engine, asked: list[Asked], request: Request) -> list[list[Event]]:
    """Returns all events of each request.

    Raises:
      Unserved: if one of them failed.
    """
    collected: list[list[Event]] = [[] for _ in asked]
    async with contextlib.aclosing(_submit(engine, asked, request)) as events:
        async for place, event in events:
            if isinstance(event, Failed):
                raise Unserved(event)
            collected[place].append(event)
    return collected


def _submit(
    engine: Engine, asked: list[Asked], request: Request
) -> AsyncGenerator[tuple[int, Event]]:
    """Submits requests; returns their events as they come. Whoever stops listening, or whose
    client goes, ends them.

    Raises:
      QueueFull, Closed: as of ``Engine.submit``.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(place: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, (place, event))

    sequences = engine.submit(asked, deliver)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(sequences)

    watching = asyncio.create_task(watch())  # now: the events may never be asked for

    async def events() -> AsyncGenerator[tuple[int, Event]]:
        try:
            n_open = len(sequences)
            while n_open:
                place, event = await queue.get()
                n_open -= isinstance(event, End | Failed)
                yield place, event
        finally:
            watching.cancel()
            engine.cancel(sequences)

    return events()


def _answer_errors(app: FastAPI) -> None:
    """Gives every error OpenAI's form."""

    def handle(of: type[Exception] | int, answer: Callable[[Request, Any], Response]) -> None:
        async def handler(request: Request, exception: Exception) -> Response:
            return answer(request, exception)

        app.add_exception_handler(of, handler)

    handle(BadRequest, lambda _, e: _json(error(str(e), field=e.field, code=e.code), e.status))
    handle(UserError, lambda _, e: _json(error(str(e)), 400))
    handle(RequestValidationError, _invalid)
    handle(HTTPException, _refused)
    handle(QueueFull, lambda *_: _later(429, "as many requests wait as may", "queue_full"))
    handle(
        WarmingUp,
        lambda *_: _later(
            503, "the server is warming up: it compiles its programs", "warming_up", _WARM_UP_SECS
        ),
    )
    handle(Closed, lambda *_: _later(503, "the server is stopping", "stopping"))
    handle(
        Unserved,
        lambda _, e: _json(
            error(str(e), "server_error", code=e.failed.reason), _FAILED[e.failed.reason]
        ),
    )


def _refused(request: Request, exception: HTTPException) -> Response:
    """Answers what the framework itself refuses."""
    path, headers = request.url.path, dict(exception.headers or {})
    message = str(exception.detail)
    if exception.status_code == 404:
        message = f"there is no path {path}"
    elif exception.status_code == 405:
        headers["Allow"] = headers["Allow"].replace("GET", "GET, HEAD")
        message = f"{path} does not take {request.method}; it takes {headers['Allow']}"
    elif exception.__cause__:  # of a body that Python's json cannot read
        message = _NO_JSON.format(exception.__cause__)
    return _json(error(message), exception.status_code, headers)


def _invalid(request: Request, exception: RequestValidationError) -> Response:
    first = exception.errors()[0]
    kind, value = first["type"], first.get("input")
    message = first["msg"].replace("dictionary", "object")
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
    field = "".join(parts).removeprefix(".") or None
    status = 400
    if kind == "json_invalid":
        field, problem = None, first["ctx"]["error"]
        message = _NO_JSON.format(f"{problem} at character {first['loc'][-1]}")
    elif kind == "missing":
        message = f"{field or 'the body'} is missing"
    elif field is not None:
        message = message.removeprefix("Value error, ")
        message = f"{field}: {message[0].lower()}{message[1:]}, not {shown(value)}"
    elif isinstance(value, bytes):  # the framework did not try to read it
        status, given = 415, request.headers.get("content-type")
        given = f"Content-Type is {given}" if given else "there is no Content-Type"
        message = f"{given}; send JSON as Content-Type: application/json"
    else:
        message = f"the body must be a JSON object, not {shown(value)}"
    return _json(error(message, field=field), status)


def _later(status: int, message: str, code: str, secs: int = _RETRY_SECS) -> Response:
    content = error(f"{message}; try again later", "server_error", code=code)
    return _json(content, status, _retry(secs))


def _retry(secs: int) -> dict[str, str]:
    return {"Retry-After": str(secs)}


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # Escapes: a prompt may hold lone surrogates, which UTF-8 has no bytes for.
    return Response(json.dumps(content), status, headers, "application/json")


def _line(content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
