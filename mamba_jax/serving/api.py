"""The server's paths: ``/generate``, OpenAI's ``/v1/…``, and monitoring."""

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
from mamba_jax.serving.auth import AuthAndLimits
from mamba_jax.serving.engine import Closed, Engine, QueueFull, WarmingUp
from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.page import load_page
from mamba_jax.serving.protocol import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    shown,
)
from mamba_jax.serving.request_parser import RequestParser
from mamba_jax.serving.responses import GenerateResponseBuilder, ResponseBuilder, error
from mamba_jax.serving.sequence import End, Event, Failed, GenerationRequest

_FAILED = {"timeout": 504, "cancelled": 499, "stopping": 503, "error": 500}
_RETRY_SECS = 1
_WARM_UP_SECS = 5
_NO_JSON = "the body is not valid JSON: {}"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not buffer


class Unserved(Exception):
    """The engine did not serve a request."""

    def __init__(self, failed: Failed):
        super().__init__(failed.message)
        self.failed = failed


def make_app(
    engine: Engine,
    parser: RequestParser,
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
      engine: started by the caller.
      parser: for the engine's model.
      metrics: the engine's observer.
      model_name: what clients call the model.
      api_key: clients must send it; None: no key is needed.
      cors_origins: whose pages may send requests from a browser.
      max_body_bytes: size limit of a request's body.
      on_stop: called when the server has stopped.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        on_stop()

    app = FastAPI(title="mamba_jax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        AuthAndLimits, api_key=api_key, max_body_bytes=max_body_bytes, metrics=metrics
    )
    if cors_origins:  # outermost: preflight requests carry no key; errors need the headers, too
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
        requests = await asyncio.to_thread(parser.generate, body)
        return await _respond(
            engine, requests, GenerateResponseBuilder(), request, bool(body.stream)
        )

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(body.model, model_name)
        requests = await asyncio.to_thread(parser.completion, body)
        builder = ResponseBuilder(
            "completion",
            model_name,
            engine.tokenizer,
            requests,
            echo=bool(body.echo),
        )
        return await _respond(
            engine, requests, builder, request, bool(body.stream), body.with_usage
        )

    @app.post("/v1/chat/completions")
    async def chats(body: ChatRequest, request: Request) -> Response:
        _check_model(body.model, model_name)
        requests = await asyncio.to_thread(parser.chat, body)
        builder = ResponseBuilder("chat", model_name, engine.tokenizer, requests)
        return await _respond(
            engine, requests, builder, request, bool(body.stream), body.with_usage
        )

    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mamba_jax"}


def _check_model(requested: str | None, name: str) -> None:
    if requested is not None and requested != name:
        raise BadRequest(
            f"model {requested!r} does not exist; this server has {name!r}",
            "model",
            "model_not_found",
            404,
        )


async def _respond(
    engine: Engine,
    requests: list[GenerationRequest],
    builder: ResponseBuilder | GenerateResponseBuilder,
    request: Request,
    stream: bool,
    usage: bool = False,
) -> Response:
    if not stream:
        events = await _collect(engine, requests, request)
        # In a thread: with the logprobs of a long prompt it is megabytes.
        return await asyncio.to_thread(lambda: _json(builder.whole(events)))
    # Before the response starts, so that a full queue still becomes a status.
    events = _submit(engine, requests, request)

    async def lines() -> AsyncIterator[bytes]:
        for chunk in builder.first_chunks():
            yield _line(chunk)
        async with contextlib.aclosing(events):
            async for choice, event in events:
                if isinstance(event, Failed):
                    yield _line(error(event.message, "server_error", code=event.reason))
                    return
                for chunk in builder.chunks(choice, event):
                    yield _line(chunk)
        if usage and isinstance(builder, ResponseBuilder):
            yield _line(builder.usage_chunk())
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers=_HEADERS)


async def _collect(
    engine: Engine, requests: list[GenerationRequest], request: Request
) -> list[list[Event]]:
    """Returns all events of each generation request.

    Raises:
      Unserved: if one of them failed.
    """
    collected: list[list[Event]] = [[] for _ in requests]
    async with contextlib.aclosing(_submit(engine, requests, request)) as events:
        async for index, event in events:
            if isinstance(event, Failed):
                raise Unserved(event)
            collected[index].append(event)
    return collected


def _submit(
    engine: Engine, requests: list[GenerationRequest], request: Request
) -> AsyncGenerator[tuple[int, Event]]:
    """Submits requests; returns their events as they come. Closing the generator, or a client that
    disconnects, cancels them.

    Raises:
      QueueFull, WarmingUp, Closed: see ``Engine.submit``.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def deliver(index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has stopped
            loop.call_soon_threadsafe(queue.put_nowait, (index, event))

    sequences = engine.submit(requests, deliver)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(sequences)

    watching = asyncio.create_task(watch())  # now: the generator may never be started

    async def events() -> AsyncGenerator[tuple[int, Event]]:
        try:
            n_open = len(sequences)
            while n_open:
                index, event = await queue.get()
                n_open -= isinstance(event, End | Failed)
                yield index, event
        finally:
            watching.cancel()
            engine.cancel(sequences)

    return events()


def _answer_errors(app: FastAPI) -> None:
    """Converts every error to OpenAI's form."""

    def handle(of: type[Exception] | int, answer: Callable[[Request, Any], Response]) -> None:
        async def handler(request: Request, exception: Exception) -> Response:
            return answer(request, exception)

        app.add_exception_handler(of, handler)

    handle(BadRequest, lambda _, e: _json(error(str(e), field=e.field, code=e.code), e.status))
    handle(UserError, lambda _, e: _json(error(str(e)), 400))
    handle(RequestValidationError, _invalid)
    handle(HTTPException, _refused)
    handle(QueueFull, lambda *_: _later(429, "the waiting queue is full", "queue_full"))
    handle(
        WarmingUp,
        lambda *_: _later(
            503,
            "the server is warming up: it is compiling its programs",
            "warming_up",
            _WARM_UP_SECS,
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
    """Converts errors of the framework itself."""
    path, headers = request.url.path, dict(exception.headers or {})
    message = str(exception.detail)
    if exception.status_code == 404:
        message = f"path {path} does not exist"
    elif exception.status_code == 405:
        headers["Allow"] = headers["Allow"].replace("GET", "GET, HEAD")
        message = f"{path} does not support {request.method}; use {headers['Allow']}"
    elif exception.__cause__:  # a body that Python's json cannot parse
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
    elif isinstance(value, bytes):  # the framework did not parse it
        status, given = 415, request.headers.get("content-type")
        given = f"Content-Type is {given}" if given else "Content-Type is missing"
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
    # ASCII escapes: a prompt may hold lone surrogates, which UTF-8 cannot encode.
    return Response(json.dumps(content), status, headers, "application/json")


def _line(content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
