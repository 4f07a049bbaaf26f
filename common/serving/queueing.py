"""The bounded queue in front of an engine: what does not fit is refused at once instead of waiting forever."""

import asyncio
from contextlib import asynccontextmanager

from common.serving.metrics import Metrics
from common.serving.schemas import ApiError


class Gate:
    """At most `slots` requests inside and `queue` waiting, first come, first served."""

    def __init__(self, slots: int, queue: int, metrics: Metrics):
        self._slots = asyncio.Semaphore(slots)
        self._queue, self._waiting, self._metrics = queue, 0, metrics
        metrics.queue_limit.set(queue)

    @asynccontextmanager
    async def enter(self, deadline: float):
        """Wait for a slot until `deadline` (event loop time). Raises ApiError 429 at once when the queue is full."""
        if self._slots.locked() and self._waiting >= self._queue:
            raise ApiError(429, "The service is at its limit; try again soon.", "rate_limit_error", code="overloaded")
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)
        self._metrics.running.inc()
        try:
            yield
        finally:
            self._metrics.running.dec()
            self._slots.release()
