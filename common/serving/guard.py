"""Around everything else: host, key and sizes of a request, its id, and the count and the log of answers by status."""

import hmac
import logging
import re
import time
import uuid

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.serving.metrics import Metrics
from common.serving.schemas import ApiError, invalid

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTH = ("/health/live", "/health/ready")
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::[0-9]{1,5})?")
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16384


class Guard:
    """ASGI middleware. Everything but /health needs the key (when there is one); no body may exceed `max_bytes`.

    hosts: the names that the service goes by. A page elsewhere can make its own name lead to this machine's loopback
    (DNS rebinding), and then asks with a browser's help, but under its own name.
    """

    def __init__(self, app: ASGIApp, *, api_key: str, hosts: tuple[str, ...], max_bytes: int, metrics: Metrics):
        self.app, self.api_key, self.hosts = app, api_key, [host.lower() for host in hosts]
        self.max_bytes, self.metrics = max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = (*HEALTH, *ENDPOINTS, "/metrics")
        path = scope["path"] if scope["path"] in known else "other"  # what clients make up is one label
        state = scope.setdefault("state", {})
        state["request_id"] = uuid.uuid4().hex
        start, status, received = time.perf_counter(), 499, 0  # 499: the client left before its answer began

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:  # a body in chunks announces no length
                raise HTTPException(413, f"The body exceeds {self.max_bytes} bytes.")
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.requests.labels(path, status).inc()
                marked = [*message.get("headers", ()), (b"x-request-id", state["request_id"].encode())]
                message = message | {"headers": marked}
            await send(message)

        refused = self._refuse(scope)
        try:
            if refused:
                await JSONResponse(refused.body, refused.status)(scope, receive, marked_send)
            else:
                await self.app(scope, limited_receive, marked_send)
        finally:
            fields = {"request_id": state["request_id"], "path": path, "status": status}
            fields |= {"seconds": round(time.perf_counter() - start, 4), **state.get("answer", {})}
            level = logging.DEBUG if path in (*HEALTH, "/metrics") else logging.INFO
            log.log(level, "request", extra={"fields": fields})

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            return invalid(f"At most {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes of them.", status=431)
        if "*" not in self.hosts and _host(headers.get(b"host", b"")) not in self.hosts:
            return invalid("This service does not go by the name in the Host header; see --hosts.")
        if self.api_key and scope["path"] not in HEALTH:
            given, expected = headers.get(b"authorization", b""), f"Bearer {self.api_key}".encode()
            if not hmac.compare_digest(given, expected):  # takes as long for a nearly right key as for a wrong one
                return ApiError(401, "Wrong or missing API key.", "authentication_error", code="invalid_api_key")
        if int(headers.get(b"content-length", 0)) > self.max_bytes:
            return invalid(f"The body exceeds {self.max_bytes} bytes.", status=413)
        return None


def _host(header: bytes) -> str:
    """The name without the port: `localhost:8080`, `[::1]:8080`; nothing for what is neither."""
    found = HOST.fullmatch(header.decode("latin-1").lower())
    return (found["v6"] or found["name"]) if found else ""
