"""One request's way: checked, through the queue to the engine, and its answer back, whole or as a stream."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import fastapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException

from common.serving import sse
from common.serving.metrics import Metrics
from common.serving.queueing import Gate, client_of
from common.serving.schemas import AnswerShape, ApiError, Piece, Request, invalid

Prepared = Any  # token ids, or the request to pass on: each engine's own


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be. The defaults of `python -m common.serving`."""

    slots: int = 8  # requests computed together
    queue: int = 16  # requests that may wait for a slot
    max_prompt: int = 1024  # tokens
    max_output: int = 512  # tokens
    max_bytes: int = 65536  # of a request's body
    timeout: float = 120.0  # seconds from arrival to the last token
    patience: float = 30.0  # seconds for a client to send its request, or to take what was sent to it


class Engine(Protocol):
    """What computes the answers: a model in this process (`TransformersEngine`) or another server (`HttpEngine`)."""

    name: str  # of the model, as requests have it

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Called when every accepted request has been answered."""

    def alive(self) -> bool:
        """Whether it can work at all; otherwise only a new process helps."""

    async def ready(self) -> bool:
        """Whether it can take a request now."""

    async def prepare(self, body: Request) -> Prepared:
        """What `generate` wants to have of a request. Raises ApiError (400) where it cannot be served."""

    def generate(self, body: Request, prepared: Prepared, max_tokens: int) -> AsyncIterator[Piece]:
        """The answer, piece by piece, the last one with a finish_reason. Closing the iterator ends the work."""


class Service:
    """Takes requests through the queue to the engine and their answers back."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.gate = Gate(limits.slots, limits.queue, self.metrics)

    async def respond(self, body: Request, request: fastapi.Request) -> Response:
        """Answer whole or as a stream. Errors before the first token are told by the HTTP status."""
        if body.model != self.engine.name:
            raise ApiError(404, f"There is no model {body.model!r}.", "invalid_request_error", code="model_not_found")
        max_tokens = body.token_limit or self.limits.max_output
        if max_tokens > self.limits.max_output:
            raise invalid(f"max_tokens is {max_tokens}; at most {self.limits.max_output} are allowed.", "max_tokens")
        shape = AnswerShape(body, request.state.request_id)
        client = client_of(request.client.host if request.client else "")
        pieces = _ahead(self.answer(body, max_tokens, client, request.state))
        if body.stream:
            first = await self.unless_gone(request, anext(pieces))
            events = self.events(shape, first, pieces, body.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        everything = await self.unless_gone(request, _collect(pieces))
        last = everything[-1]
        text = "".join(piece.text for piece in everything)
        return JSONResponse(shape.whole(text, last.finish_reason, last.usage))

    async def answer(self, body: Request, max_tokens: int, client: str, state: State) -> AsyncIterator[Piece]:
        """The engine's pieces for one request, timed, counted, noted for the log, and ended by the time limit."""
        start, loop = time.perf_counter(), asyncio.get_running_loop()
        deadline = loop.time() + self.limits.timeout
        first, counted = 0.0, 0
        try:
            async with self.gate.enter(deadline, client), aclosing(self.computed(body, max_tokens)) as pieces:
                while True:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces)
                    if not first:
                        first = time.perf_counter()
                        self.metrics.first_token.observe(first - start)
                    self.metrics.generated_tokens.inc(max(0, piece.completion_tokens - counted))
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
        state.answer = piece.usage | {"finish_reason": piece.finish_reason}
        self.metrics.prompt_tokens.inc(piece.prompt_tokens)
        self.metrics.duration.observe(end - start)
        if counted > 1:
            self.metrics.per_token.observe((end - first) / (counted - 1))

    async def computed(self, body: Request, max_tokens: int) -> AsyncIterator[Piece]:
        """The engine's pieces, from the request's text on."""
        prepared = await self.engine.prepare(body)
        async with aclosing(self.engine.generate(body, prepared, max_tokens)) as pieces:
            async for piece in pieces:
                yield piece

    async def events(
        self, shape: AnswerShape, first: Piece, rest: AsyncIterator[Piece], wants_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events, the last one `[DONE]`. An error that comes later than the status is an event too."""
        async with aclosing(rest):
            yield sse.event(shape.chunk(first.text, first.finish_reason, first=True))
            last = first
            try:
                async for last in rest:
                    if last.text or last.finish_reason:
                        yield sse.event(shape.chunk(last.text, last.finish_reason, first=False))
            except ApiError as error:
                yield sse.event(error.body)
            else:
                if wants_usage:
                    yield sse.event(shape.usage_chunk(last.usage))
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


async def _ahead(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """The same pieces, asked for by a task that does not wait for their reader: who stalls holds no slot.

    What waits here is an answer at most, and the connection is cut when nobody reads (see `connections`).
    """
    waiting: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def fill() -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    waiting.put_nowait(piece)
        except Exception as error:
            waiting.put_nowait(error)

    task = asyncio.create_task(fill())
    try:
        while True:
            item = await waiting.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason:
                await task  # it counts the answer and gives its slot back
                return
    finally:
        task.cancel()


async def _collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _disconnected(request: fastapi.Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
