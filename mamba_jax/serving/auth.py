"""Checks every request first: its API key, and the size and arrival time of its body."""

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.responses import error

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]
_OPEN = ("/", "/health", "/ready")  # need no key: the page prompts for one
_BODY_SECS = 30.0  # for a request's body to arrive
_SEND_SECS = 60.0  # for a client to accept a part of its response
_log = logging.getLogger(__name__)


class AuthAndLimits:
    """ASGI middleware.

    HEAD is answered like GET, without the body. A trailing slash is ignored.
    """

    def __init__(self, app: App, *, api_key: str | None, max_body_bytes: int, metrics: Metrics):
        """Wraps an application; without a key, every client has access."""
        self._app = app
        self._api_key = api_key
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Refuses a request or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        path = scope["path"].rstrip("/") or "/"
        scope = scope | {"path": path, "method": "GET" if is_head else scope["method"]}

        async def counting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = scope.get(
                    "route"
                )  # set by the router; unknown paths must not become labels
                path = getattr(route, "path", "other")
                self._metrics.responses.labels(path, message["status"]).inc()
                started.append(True)
            elif is_head:
                message = message | {"body": b""}
            async with asyncio.timeout(_SEND_SECS):
                await send(message)

        started: list[bool] = []
        headers = dict(scope["headers"])
        if not self._may_pass(scope["path"], headers):
            refusal = error(
                "missing or invalid API key; send Authorization: Bearer KEY", code="invalid_api_key"
            )
            await _answer(counting, 401, refusal, (b"www-authenticate", b"Bearer"))
            return
        try:
            body = await asyncio.wait_for(self._body(receive, headers), _BODY_SECS)
        except TimeoutError:
            await _answer(
                counting, 408, error(f"the body did not arrive within {_BODY_SECS:.0f} s")
            )
            return
        if body is None:
            limit = self._max_body_bytes
            too_large = error(f"the body is larger than {limit:,} bytes; send a shorter prompt")
            await _answer(counting, 413, too_large)
            return
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return whole.pop() if whole else await receive()

        try:
            await self._app(scope, replay, counting)
        except TimeoutError:
            _log.warning("disconnected a client that received nothing for %.0f s", _SEND_SECS)
        except Exception:
            _log.exception("a request failed")
            if not started:
                await _answer(counting, 500, error("the server failed", "server_error"))

    def _may_pass(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._api_key is None or path in _OPEN:
            return True
        given = headers.get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._api_key.encode())

    async def _body(self, receive: Any, headers: dict[bytes, bytes]) -> bytes | None:
        """Returns the whole body; None if it is too large."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


async def _answer(send: Any, status: int, content: Any, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(content).encode()
    headers = (
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the body is not read
        *headers,
    )
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
