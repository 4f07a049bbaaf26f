"""What happens to a request before anything reads its body: key, size, and the count of answers by status."""

import hmac

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.serving.metrics import Metrics
from common.serving.schemas import ApiError, invalid

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health/live",
    "/health/ready",
    "/metrics",
)


class Guard:
    """ASGI middleware. Paths under /v1 need the key (when there is one); no body may exceed `max_bytes`."""

    def __init__(self, app: ASGIApp, *, api_key: str, max_bytes: int, metrics: Metrics):
        self.app, self.api_key, self.max_bytes, self.metrics = app, api_key, max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received, path = 0, scope["path"] if scope["path"] in PATHS else "other"  # what clients make up is one label

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:  # a body in chunks announces no length
                raise HTTPException(413, f"The body exceeds {self.max_bytes} bytes.")
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        refused = self._refuse(scope)
        if refused:
            await JSONResponse(refused.body, refused.status)(scope, receive, counted_send)
            return
        try:
            await self.app(scope, limited_receive, counted_send)
        except Exception:
            self.metrics.requests.labels(path, 500).inc()  # the server answers for us
            raise

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.api_key and scope["path"].startswith("/v1"):
            given, expected = headers.get(b"authorization", b""), f"Bearer {self.api_key}".encode()
            if not hmac.compare_digest(given, expected):  # takes as long for a nearly right key as for a wrong one
                return ApiError(401, "Wrong or missing API key.", "authentication_error", code="invalid_api_key")
        if int(headers.get(b"content-length", 0)) > self.max_bytes:
            return invalid(f"The body exceeds {self.max_bytes} bytes.", status=413)
        return None
