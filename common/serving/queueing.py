"""The bounded queue in front of an engine: what does not fit is refused at once instead of waiting forever."""

import asyncio
import ipaddress
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

from common.serving.metrics import Metrics
from common.serving.schemas import ApiError

HALF_LIFE = 60.0  # seconds after which half of what a client has had is forgotten
REMEMBERED = 4096  # clients
ABANDONED = 4.0  # how many times the slot-seconds of an answer count whose reader left: nobody had anything of them


class RecentUse:
    """The slot-seconds that each client has had lately; times are `time.monotonic`'s."""

    def __init__(self):
        self._had: dict[str, tuple[float, float]] = {}  # slot-seconds, and when that was written

    def of(self, client: str, now: float) -> float:
        seconds, written = self._had.get(client, (0.0, now))
        return seconds * 0.5 ** ((now - written) / HALF_LIFE)

    def add(self, client: str, seconds: float, now: float) -> None:
        """Add to a client's account; the one that was written longest ago is forgotten when there are too many."""
        had = self.of(client, now) + seconds
        self._had.pop(client, None)  # so that the dictionary's order is the order of writing
        self._had[client] = (had, now)
        if len(self._had) > REMEMBERED:
            del self._had[next(iter(self._had))]


@dataclass(eq=False)
class _Waiting:
    client: str
    turn: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Gate:
    """At most `slots` requests inside and `queue` waiting; the next place goes to the client that had the least.

    Who asks more often, or for longer answers, thereby gets no larger share, and who leaves before the end a smaller
    one. A client alone is served in order.
    Nor can it fill the queue: a client that had less takes the place of its last request there, which is refused.
    (Weighted fair queueing, Demers et al., SIGCOMM 1989, with slot-seconds for bytes.)
    """

    def __init__(self, slots: int, queue: int, metrics: Metrics):
        self._free, self._queue, self._metrics = slots, queue, metrics
        self._waiting: list[_Waiting] = []  # in the order of arrival
        self._inside: Counter[str] = Counter()
        self._usage = RecentUse()
        metrics.queue_limit.set(queue)

    @asynccontextmanager
    async def enter(self, deadline: float, client: str):
        """Wait for a slot until `deadline` (event loop time). Raises ApiError 429 when the queue has no place."""
        await self._wait(client, deadline)
        self._metrics.running.inc()
        start, weight = monotonic(), 1.0
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            weight = ABANDONED
            raise
        finally:
            self._metrics.running.dec()
            end = monotonic()
            self._usage.add(client, weight * (end - start), end)
            self._leave(client)

    async def _wait(self, client: str, deadline: float) -> None:
        mine = _Waiting(client)
        self._waiting.append(mine)
        self._admit()
        if len(self._waiting) > self._queue:
            self._refuse_one()
        self._metrics.waiting.set(len(self._waiting))
        try:
            async with asyncio.timeout_at(deadline):
                await mine.turn
        except BaseException:
            if mine in self._waiting:
                self._waiting.remove(mine)
            elif not mine.turn.cancelled() and not mine.turn.exception():  # its turn came as it gave up
                self._leave(client)
            raise
        finally:
            self._metrics.waiting.set(len(self._waiting))

    def _admit(self) -> None:
        """Fill the free places; of clients that are equal, who came first."""
        now = monotonic()
        while self._free and self._waiting:
            chosen = min(self._waiting, key=lambda w: (self._inside[w.client], self._usage.of(w.client, now)))
            self._waiting.remove(chosen)
            if not chosen.turn.done():  # cancelled, and not yet aware of it
                self._free -= 1
                self._inside[chosen.client] += 1
                chosen.turn.set_result(None)

    def _refuse_one(self) -> None:
        """Of the client that holds and wants the most, the last to come."""
        now, has = monotonic(), self._inside + Counter(w.client for w in self._waiting)
        refused = max(reversed(self._waiting), key=lambda w: (has[w.client], self._usage.of(w.client, now)))
        self._waiting.remove(refused)
        if not refused.turn.done():
            message = "The service is at its limit; try again soon."
            refused.turn.set_exception(ApiError(429, message, "rate_limit_error", code="overloaded"))

    def _leave(self, client: str) -> None:
        self._free += 1
        self._inside[client] -= 1
        if not self._inside[client]:
            del self._inside[client]
        self._admit()


def client_of(address: str) -> str:
    """Who asks, by address. Of IPv6 the network: one host there has 2^64 addresses to ask from."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a socket in the file system has no address
        return address
    return str(ipaddress.ip_network(f"{parsed}/64", strict=False)) if parsed.version == 6 else address
