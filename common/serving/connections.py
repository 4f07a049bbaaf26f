"""Connections that do not move are cut: those on which no whole request arrives, and those that nobody reads.

uvicorn bounds the pause between two requests, and waits without limit for the first byte, for the rest of a request,
and for a reader. Each such connection costs memory and a file descriptor (Slowloris, slow read).
"""

import asyncio
from functools import partial

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512  # at a time; to others uvicorn says 503
IDLE_SECONDS = 5  # between two requests of a connection


class Connection(H11Protocol):
    """uvicorn's connection, cut when a request takes more than `patience` seconds to come, or an answer to be read."""

    def __init__(self, *, patience: float, **of_uvicorn):
        super().__init__(**of_uvicorn)
        self._patience = patience
        self._arriving: asyncio.TimerHandle | None = None  # runs unless a request is being answered
        self._stalled: asyncio.TimerHandle | None = None  # runs while something sent has not been taken

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # what the system has no room for, the client has not read
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._cut_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancel(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._arriving, self._stalled = _cancel(self._arriving), _cancel(self._stalled)

    def _watch(self) -> None:
        """Bytes that come one by one do not start the timer anew: only a whole request stops it."""
        if self.cycle and not self.cycle.more_body and not self.cycle.response_complete:
            self._arriving = _cancel(self._arriving)
        elif not self._arriving and not self.transport.is_closing():
            self._arriving = self._cut_later()

    def _cut_later(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self._patience, self.transport.abort)  # close() would wait for the reader


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()


def uvicorn_config(app, limits, host: str = "127.0.0.1", port: int = 8080) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=partial(Connection, patience=limits.patience),
        ws="none",
        log_config=None,
        access_log=False,  # the guard writes its own
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(limits.timeout) + 1,  # what was accepted is finished first
    )
