"""The HTTP side: an OpenAI-compatible service in front of an engine."""

from contextlib import asynccontextmanager

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from common.serving.guard import ENDPOINTS, LOOPBACK, Guard
from common.serving.schemas import ApiError, ChatRequest, CompletionRequest, invalid
from common.serving.service import Engine, Limits, Service

RETRY_AFTER = "1"  # seconds; a place in the queue becomes free whenever any answer ends


def create_app(
    engine: Engine, limits: Limits, api_key: str = "", hosts: tuple[str, ...] = LOOPBACK, docs: bool = False
) -> ASGIApp:
    """The service.

    hosts: the names that it may be called by, "*" for any. docs: FastAPI's pages about the service, at /docs.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        await engine.start()
        yield
        await engine.stop()  # uvicorn ends the lifespan when every accepted request has been answered

    pages = {} if docs else {"openapi_url": None}  # without the document there is no page either
    app = FastAPI(title="LLM service", version="1", lifespan=lifespan, **pages)
    service = Service(engine, limits)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    @app.get("/health/live")
    async def live() -> Response:
        return _health("live", engine.alive())

    @app.get("/health/ready")
    async def ready() -> Response:
        return _health("ready", await engine.ready())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: fastapi.Request) -> Response:
        return await service.respond(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Response:
        return await service.respond(body, request)

    return Guard(app, api_key=api_key, hosts=hosts, max_bytes=limits.max_bytes, metrics=service.metrics)


def _health(word: str, good: bool) -> Response:
    return JSONResponse({"status": word if good else f"not {word}"}, 200 if good else 503)


async def _api_error(request, error: ApiError) -> Response:
    headers = {"Retry-After": RETRY_AFTER} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


async def _validation_error(request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]).encode(errors="replace").decode()
    what = "this service does not support it" if first["type"] == "extra_forbidden" else first["msg"]
    refusal = invalid(f"{place or 'body'}: {what}", place or None)
    return JSONResponse(refusal.body, refusal.status)


async def _http_error(request, error: HTTPException) -> Response:
    message = str(error.detail)
    if error.status_code == 404:
        message = f"This service has {', '.join(ENDPOINTS)}, and not what was asked for."
    return JSONResponse(invalid(message, status=error.status_code).body, error.status_code, error.headers)


async def _internal_error(request, error: Exception) -> Response:
    refusal = ApiError(500, "Internal error.", "server_error")
    return JSONResponse(refusal.body, refusal.status)
