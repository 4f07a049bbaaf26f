"""The other engine: an OpenAI-compatible server, such as vLLM, does the work; this service guards and observes it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import httpx

from common.serving import sse
from common.serving.guard import LOOPBACK
from common.serving.schemas import ApiError, ChatRequest, Piece, Request, invalid

READY_SECONDS = 1.0
# What reading an answer raises that is none.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
PATIENCE = httpx.Timeout(5.0, read=None)  # seconds to connect; how long an answer may take is the service's limit


class HttpEngine:
    """Serves what the server at `url` (such as http://127.0.0.1:8000) serves as model `name`."""

    def __init__(self, url: str, name: str, api_key: str = ""):
        self.name = name
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy named in the environment is no way to the loopback, and would be handed the key.
        near = httpx.URL(url).host in LOOPBACK
        self._asked = asyncio.Lock()
        self._ready, self._ready_until = False, 0.0
        self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE, trust_env=not near)

    async def start(self) -> None:
        """Nothing: the server runs already, or /health/ready says that it does not."""

    async def stop(self) -> None:
        await self._client.aclose()

    def alive(self) -> bool:
        return True

    async def ready(self) -> bool:
        """Whether the server answers and has the model; it is asked once a second, however often this is."""
        async with self._asked:
            if time.monotonic() > self._ready_until:
                self._ready = await self._ask()
                self._ready_until = time.monotonic() + READY_SECONDS
        return self._ready

    async def _ask(self) -> bool:
        try:
            answer = await self._client.get("/v1/models", timeout=2.0)
            return answer.status_code == 200 and self.name in [model["id"] for model in answer.json()["data"]]
        except (httpx.HTTPError, *UNREADABLE):
            return False

    async def prepare(self, body: Request) -> dict:
        """The request to pass on: always a stream that ends with the token counts."""
        return body.model_dump(exclude_none=True) | {"stream": True, "stream_options": {"include_usage": True}}

    async def generate(self, body: Request, prepared: dict, max_tokens: int) -> AsyncIterator[Piece]:
        """The server's answer, piece by piece. Closing the iterator closes the connection, which ends its work."""
        path = "/v1/chat/completions" if isinstance(body, ChatRequest) else "/v1/completions"
        request = {key: value for key, value in prepared.items() if key != "max_completion_tokens"}
        try:
            async with self._client.stream("POST", path, json=request | {"max_tokens": max_tokens}) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer.status_code, await answer.aread())
                async for piece in _pieces(answer.aiter_bytes()):
                    yield piece
        except (httpx.HTTPError, *UNREADABLE) as error:
            raise ApiError(502, "The model server failed.", "server_error", code="backend") from error


async def _pieces(body: AsyncIterator[bytes]) -> AsyncIterator[Piece]:
    """Pieces from server-sent events. The reason to finish is kept for the last event, which has the counts."""
    counted, reason = 0, None
    async for data in sse.read_events(body):
        if data == "[DONE]":
            break
        event = json.loads(data)
        if "error" in event:
            raise ValueError(event["error"])
        if event["choices"]:
            choice = event["choices"][0]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            reason = choice["finish_reason"] or reason
            if text:
                text.encode()  # half a surrogate pair is no text
                counted += 1  # servers send about one token an event; the exact count comes last
                yield Piece(text, 0, counted)
        elif event.get("usage"):
            counts = [max(0, int(event["usage"][name])) for name in ("prompt_tokens", "completion_tokens")]
            yield Piece("", *counts, reason or "stop")
            return
    raise ValueError("the stream ended early")


def _refusal(status: int, content: bytes) -> ApiError:
    """The server's own refusal: a client's mistake stays one, anything else is the server's failure."""
    if status not in (400, 422):
        return ApiError(502, f"The model server answered {status}.", "server_error", code="backend")
    try:
        answer = json.loads(content)
        message = answer.get("error", answer)["message"]
        message.encode()
    except UNREADABLE:
        message = "The model server refused the request."
    return invalid(message)
