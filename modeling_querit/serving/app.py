"""The routes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json, to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..pair_encoding_querit import Document, document_text
from .engine import Engine, Scored
from .errors import RequestError, error_response, validation_sentence
from .jobs import Options
from .metrics import CONTENT_TYPE, Metrics
from .middleware import Gate
from .page import add_page
from .schemas import (
    ErrorResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
    TextResult,
)
from .settings import ServerSettings

Result = TypeVar("Result")

_DESCRIPTION = (
    "Puts documents in the order in which they answer a query. Scores are p1 - p0, from -1 to 1. The routes for "
    "reranking take the same requests; they are there for the clients that call them."
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON."},
    401: {"model": ErrorResponse, "description": "The token is missing or wrong."},
    404: {"model": ErrorResponse, "description": "Another model is served."},
    413: {"model": ErrorResponse, "description": "Too many documents, characters or bytes."},
    415: {"model": ErrorResponse, "description": "The body is not said to be JSON."},
    422: {"model": ErrorResponse, "description": "A field is missing, or has the wrong type or value."},
    429: {"model": ErrorResponse, "description": "The queue is full; Retry-After says when to try again."},
}


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Parse the body; numbers and characters that JSON does not have are errors."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            # FastAPI makes a sentence of its own of any other error.
            raise HTTPException(400, f"The body is not valid JSON: {error}.") from None


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Have the body parsed by `_StrictRequest`."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def create_app(engine: Engine, settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """Make the application; the engine is started and closed with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.start)
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="Querit reranker", description=_DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.route_class = _StrictRoute
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_reranking(app, engine, settings)
    _add_scoring(app, engine, settings)
    _add_state(app, engine, settings, metrics)
    add_page(app)
    routes = [route.path for route in app.routes if hasattr(route, "path")]
    app.add_middleware(Gate, settings=settings, metrics=metrics, routes=routes)
    return app


def _add_reranking(app: FastAPI, engine: Engine, settings: ServerSettings) -> None:
    def add(path: str, returns_documents: bool) -> None:
        async def rerank(body: RerankRequest, request: Request) -> Response:
            documents = body.documents if body.documents is not None else body.texts or []
            scored = await _score(request, engine, settings, body, [(body.query, document) for document in documents])
            order = sorted(range(len(documents)), key=lambda index: -scored.scores[index])[: body.top_n]
            if body.texts is not None:
                return _json(_text_results(documents, order, scored.scores, body.return_text))
            with_documents = returns_documents if body.return_documents is None else body.return_documents
            results = [
                {"index": index, "relevance_score": scored.scores[index]}
                | ({"document": _as_object(documents[index])} if with_documents else {})
                for index in order
            ]
            head = {"id": f"rerank-{uuid.uuid4().hex}", "model": settings.name}
            return _json(head | {"results": results, "usage": _usage(scored)})

        app.post(
            path,
            response_model=RerankResponse | list[TextResult],
            responses=_REFUSALS,
            summary="Put documents in order",
            name=f"rerank{path}",
        )(rerank)

    add("/rerank", returns_documents=True)
    add("/v1/rerank", returns_documents=True)
    # Cohere's second version returns no documents.
    add("/v2/rerank", returns_documents=False)


def _text_results(
    documents: Sequence[Document], order: Sequence[int], scores: Sequence[float], with_texts: bool
) -> list[dict[str, Any]]:
    return [
        {"index": index, "score": scores[index]} | ({"text": document_text(documents[index])} if with_texts else {})
        for index in order
    ]


def _add_scoring(app: FastAPI, engine: Engine, settings: ServerSettings) -> None:
    async def score(body: ScoreRequest, request: Request) -> Response:
        scored = await _score(request, engine, settings, body, body.pairs())
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scored.scores)]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return _json(head | {"model": settings.name, "data": data, "usage": _usage(scored)})

    for path in ("/score", "/v1/score"):
        app.post(path, response_model=ScoreResponse, responses=_REFUSALS, summary="Score pairs", name=f"score{path}")(
            score
        )


def _add_state(app: FastAPI, engine: Engine, settings: ServerSettings, metrics: Metrics) -> None:
    created = int(time.time())

    @app.get("/v1/models", summary="Name the served model")
    async def models() -> dict[str, Any]:
        model = {"id": settings.name, "object": "model", "created": created, "owned_by": "querit"}
        return {"object": "list", "data": [model | {"max_model_len": engine.max_length}]}

    @app.get("/health", summary="Whether the process is alive")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether requests are scored")
    async def ready() -> Response:
        return _json({"status": "ready" if engine.is_running else "closing"}, 200 if engine.is_running else 503)

    @app.get("/metrics", summary="Counters for Prometheus")
    async def counters() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)


async def _score(
    request: Request,
    engine: Engine,
    settings: ServerSettings,
    body: RerankRequest | ScoreRequest,
    pairs: Sequence[tuple[str, Document]],
) -> Scored:
    """Check a request against the limits and score its pairs, unless its client goes away."""
    if body.model and body.model != settings.name:
        raise RequestError(404, f"There is no such model here: name {settings.name}, or leave out model.")
    if len(pairs) > settings.max_documents:
        raise RequestError(413, f"{len(pairs)} documents are more than {settings.max_documents}: send fewer at once.")
    texts = {query for query, _ in pairs} | ({body.instruction} if body.instruction else set())
    chars = sum(map(len, texts)) + sum(len(document_text(document)) for _, document in pairs)
    if chars > settings.max_chars:
        message = f"{chars} characters are more than {settings.max_chars}: send fewer or shorter documents."
        raise RequestError(413, message)
    max_tokens = getattr(body, "max_tokens_per_doc", None)
    if max_tokens is not None and max_tokens < engine.max_length:
        raise RequestError(422, "max_tokens_per_doc is not supported: limit the pair by truncate_prompt_tokens.")
    options = Options(body.instruction, body.max_length)
    return await _unless_gone(request, engine.score(pairs, options, may_cut=body.truncate))


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await work, and cancel it if the client closes the connection."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_object(document: Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


def _usage(scored: Scored) -> dict[str, int]:
    return {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens}


def _json(value: Any, status: int = 200) -> Response:
    # A document may hold a number that is too large for a float.
    return Response(to_json(value, inf_nan_mode="null"), status, media_type="application/json")


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error.status, error.message, error.headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(422, validation_sentence(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {
        404: "There is nothing at this path: /docs lists the routes.",
        405: "This route does not take this method: /docs lists the routes.",
    }
    return error_response(error.status_code, sentences.get(error.status_code, str(error.detail)), error.headers)
