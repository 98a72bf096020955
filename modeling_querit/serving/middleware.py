"""Around every route: requests are counted, authorized and limited in size, and errors become sentences."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import is_authorized
from .errors import RequestError, error_response
from .metrics import Metrics
from .settings import ServerSettings

logger = logging.getLogger(__name__)

# Open to everybody: the page, which holds no data, and what a balancer asks.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
# Status of requests whose client has gone, as nginx counts them; it is never sent.
CLIENT_GONE = 499
# Time for a body to arrive, in seconds.
_BODY_SECONDS = 60.0
# How long, and how much of it, a refused body is still read and dropped: whoever is still sending would otherwise find
# the connection reset, and no answer.
_DROP_SECONDS = 5.0
_DROP_FACTOR = 8


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: The application.
        settings: Token and limits.
        metrics: Prometheus metrics to update.
        routes: Paths that are counted by name; all others are counted as one.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics, routes: Iterable[str]):
        self._app = app
        self._token = settings.token
        self._max_bytes = settings.max_body_mb * 1_000_000
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), CLIENT_GONE

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._metrics.open_requests.track_inprogress():
                await self._serve(scope, receive, send_and_note)
        finally:
            path = scope["path"]
            route = path if path in self._routes else "other"
            self._metrics.count_request(route, status, time.monotonic() - start)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            # The server sends no body then.
            scope = {**scope, "method": "GET"}
        try:
            self._check(scope)
            await self._app(scope, await self._read_body(receive), send)
        except ClientDisconnect:
            return
        except BodyTooLargeError:
            response = error_response(
                413, f"The body is larger than {self._max_bytes // 1_000_000} MB: send fewer or shorter documents."
            )
            await _answer_and_drop(response.body, receive, send, _DROP_FACTOR * self._max_bytes)
        except RequestError as error:
            await error_response(error.status, error.message, error.headers)(scope, receive, send)
        except Exception as error:
            # Without its message, which may hold a part of a document.
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s at %s\n%s", type(error).__name__, scope["path"], places)
            await error_response(500, "The request failed; the server's log says where.")(scope, receive, send)

    async def _read_body(self, receive: Receive) -> Receive:
        """Read the body, and return a function that gives it once and then what `receive` gives.

        Raises:
            BodyTooLargeError: as soon as more has come than is allowed.
            ClientDisconnect: if the client goes away.
            RequestError: if it takes too long.
        """
        parts: list[bytes] = []
        size, is_complete = 0, False
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while not is_complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    is_complete = not message.get("more_body", False)
                    if size > self._max_bytes:
                        raise BodyTooLargeError
        except TimeoutError:
            raise RequestError(408, f"The body did not come within {_BODY_SECONDS:.0f} s: send it again.") from None
        waiting: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def receive_again() -> Message:
            return waiting.pop() if waiting else await receive()

        return receive_again

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if path not in OPEN_PATHS and not path.startswith("/page/"):
            given = headers.get("authorization")
            if not is_authorized(given.encode("latin-1") if given else None, self._token):
                message = "This server needs a token: send it as 'Authorization: Bearer TOKEN'."
                raise RequestError(401, message, {"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise RequestError(415, "The body must be JSON: send the header 'Content-Type: application/json'.")
            if headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise RequestError(415, "The body must not be compressed: send it without the header Content-Encoding.")
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > self._max_bytes:
                raise BodyTooLargeError


class BodyTooLargeError(Exception):
    """The body of a request is over the limit."""


async def _answer_and_drop(content: bytes | memoryview, receive: Receive, send: Send, max_bytes: int) -> None:
    """Answer 413 before the body is read, then drop what still comes, up to a limit."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(content), "more_body": True})
    dropped = 0
    try:
        async with asyncio.timeout(_DROP_SECONDS):
            while dropped <= max_bytes:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
