"""The HTTP side: an OpenAI-compatible service in front of an engine."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from common.serving.guard import Guard
from common.serving.metrics import Metrics
from common.serving.queueing import Gate
from common.serving.schemas import AnswerShape, ApiError, ChatRequest, CompletionRequest, Piece, Request, invalid

RETRY_AFTER = "1"  # seconds; a place in the queue becomes free whenever any answer ends


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be. The defaults of `python -m common.serving`."""

    slots: int = 8  # requests computed together
    queue: int = 16  # requests that may wait for a slot
    max_prompt: int = 1024  # tokens
    max_output: int = 512  # tokens
    max_bytes: int = 65536  # of a request's body
    timeout: float = 120.0  # seconds from arrival to the last token


def create_app(engine, limits: Limits, api_key: str = "") -> FastAPI:
    """The service. `engine` has name, start, stop, ready, prepare and generate (see TransformersEngine)."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        await engine.start()
        yield
        await engine.stop()  # uvicorn ends the lifespan when every accepted request has been answered

    app = FastAPI(title="LLM service", version="1", lifespan=lifespan)
    service = Service(engine, limits)
    app.add_middleware(Guard, api_key=api_key, max_bytes=limits.max_bytes, metrics=service.metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    @app.get("/health/live")
    async def live() -> dict:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> Response:
        good = await engine.ready()
        return JSONResponse({"status": "ready" if good else "not ready"}, 200 if good else 503)

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

    return app


class Service:
    """Takes requests through the queue to the engine and their answers back."""

    def __init__(self, engine, limits: Limits):
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.gate = Gate(limits.slots, limits.queue, self.metrics)

    async def respond(self, body: Request, request: fastapi.Request) -> Response:
        """Answer whole or as a stream. Errors before the first token are told by the HTTP status."""
        if body.model != self.engine.name:
            raise ApiError(404, f"There is no model {body.model!r}.", "invalid_request_error", code="model_not_found")
        max_tokens = body.token_limit or self.limits.max_output
        if max_tokens > self.limits.max_output:
            raise invalid(f"max_tokens is {max_tokens}; at most {self.limits.max_output} are allowed.", "max_tokens")
        prepared = self.engine.prepare(body)
        shape = AnswerShape(body, uuid.uuid4().hex)
        pieces = self.answer(body, prepared, max_tokens)
        if body.stream:
            first = await self.unless_gone(request, anext(pieces))
            events = self.events(shape, first, pieces, body.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        everything = await self.unless_gone(request, _collect(pieces))
        last = everything[-1]
        text = "".join(piece.text for piece in everything)
        return JSONResponse(shape.whole(text, last.finish_reason, last.usage))

    async def answer(self, body: Request, prepared, max_tokens: int) -> AsyncIterator[Piece]:
        """The engine's pieces for one request, timed, counted, and ended by the time limit."""
        start, loop = time.perf_counter(), asyncio.get_running_loop()
        deadline = loop.time() + self.limits.timeout
        first, counted = 0.0, 0
        try:
            async with (
                self.gate.enter(deadline),
                aclosing(self.engine.generate(body, prepared, max_tokens)) as pieces,
            ):
                while True:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces)
                    if not first:
                        first = time.perf_counter()
                        self.metrics.first_token.observe(first - start)
                    self.metrics.generated_tokens.inc(piece.completion_tokens - counted)
                    counted = piece.completion_tokens
                    yield piece
                    if piece.finish_reason:
                        break
        except TimeoutError as error:
            self.metrics.errors.labels("timeout").inc()
            message = f"No complete answer within {self.limits.timeout:g} seconds."
            raise ApiError(504, message, "server_error", code="timeout") from error
        except ApiError as error:
            if error.status != 400:  # a model server may refuse what passed here
                self.metrics.errors.labels("overloaded" if error.status == 429 else "engine").inc()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.errors.labels("disconnect").inc()
            raise
        end = time.perf_counter()
        self.metrics.prompt_tokens.inc(piece.prompt_tokens)
        self.metrics.duration.observe(end - start)
        if counted > 1:
            self.metrics.per_token.observe((end - first) / (counted - 1))

    async def events(
        self, shape: AnswerShape, first: Piece, rest: AsyncIterator[Piece], wants_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events, the last one `[DONE]`. An error that comes later than the status is an event too."""
        async with aclosing(rest):
            yield _event(shape.chunk(first.text, first.finish_reason, first=True))
            last = first
            try:
                async for last in rest:
                    if last.text or last.finish_reason:
                        yield _event(shape.chunk(last.text, last.finish_reason, first=False))
            except ApiError as error:
                yield _event(error.body)
            else:
                if wants_usage:
                    yield _event(shape.usage_chunk(last.usage))
            yield "data: [DONE]\n\n"

    async def unless_gone(self, request: fastapi.Request, work: Coroutine):
        """The result of `work`, which is cancelled when the client disconnects."""
        work, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(499, "The client went away.")  # nobody reads it; it is counted
            return work.result()
        finally:
            work.cancel()
            gone.cancel()


async def _collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _disconnected(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _api_error(request, error: ApiError) -> Response:
    headers = {"Retry-After": RETRY_AFTER} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


async def _validation_error(request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]).encode(errors="replace").decode()
    refusal = invalid(f"{place or 'body'}: {first['msg']}", place or None)
    return JSONResponse(refusal.body, refusal.status)


async def _http_error(request, error: HTTPException) -> Response:
    return JSONResponse(invalid(str(error.detail), status=error.status_code).body, error.status_code, error.headers)


async def _internal_error(request, error: Exception) -> Response:
    refusal = ApiError(500, "Internal error.", "server_error")
    return JSONResponse(refusal.body, refusal.status)
