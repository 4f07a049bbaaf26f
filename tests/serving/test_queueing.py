"""The queue's shares: places go to the client that had the least; whoever asks more often gets no more."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.serving.metrics import Metrics
from common.serving.queueing import ABANDONED, HALF_LIFE, REMEMBERED, Gate, RecentUse, client_of
from common.serving.schemas import ApiError

LATER = 1000.0


async def ask(gate, client, seconds, done=None):
    """One request that holds its place for `seconds`; the status that it got."""
    try:
        async with gate.enter(asyncio.get_running_loop().time() + LATER, client):
            await asyncio.sleep(seconds)
    except ApiError as error:
        return error.status
    if done is not None:
        done.append(client)
    return 200


def test_a_client_alone_is_served_in_order():
    async def scene():
        gate, done = Gate(1, 5, Metrics()), []
        await asyncio.gather(*(ask(gate, "a", 0.001, Order(done, n)) for n in range(6)))
        return done

    assert asyncio.run(scene()) == list(range(6))


class Order:
    def __init__(self, done, number):
        self.done, self.number = done, number

    def append(self, _client):
        self.done.append(self.number)


def test_one_place_is_shared_by_time_not_by_the_number_of_requests(monkeypatch):
    """A greedy client keeps ten requests waiting, each four times as long; two others one at a time.

    Planted: without the account of what each has had, the greedy one gets nearly all.
    """
    now, had = 0.0, Counter()
    monkeypatch.setattr("common.serving.queueing.monotonic", lambda: now)

    async def again(gate, client, seconds):
        nonlocal now
        while now < 100:
            async with gate.enter(asyncio.get_running_loop().time() + LATER, client):
                now += seconds
                had[client] += seconds
                await asyncio.sleep(0)

    async def scene():
        gate = Gate(1, 12, Metrics())
        await asyncio.gather(*(again(gate, "greedy", 0.4) for _ in range(10)), *(again(gate, c, 0.1) for c in "bc"))

    asyncio.run(scene())
    assert had["greedy"] < 1.2 * min(had["b"], had["c"]), had


def test_an_answer_that_its_reader_left_counts_several_times(monkeypatch):
    now = 0.0
    monkeypatch.setattr("common.serving.queueing.monotonic", lambda: now)

    async def scene():
        nonlocal now
        gate = Gate(2, 2, Metrics())
        leaves, stays = (asyncio.create_task(ask(gate, client, 0.001)) for client in ("leaves", "stays"))
        await asyncio.sleep(0)
        now = 3.0
        leaves.cancel()
        await asyncio.gather(leaves, stays, return_exceptions=True)
        return gate._usage

    usage = asyncio.run(scene())
    assert usage.of("stays", now) == pytest.approx(3.0)
    assert usage.of("leaves", now) == pytest.approx(3.0 * ABANDONED)


def test_a_full_queue_makes_place_for_who_had_less():
    async def scene():
        gate = Gate(1, 2, Metrics())
        greedy = [asyncio.create_task(ask(gate, "greedy", 0.02)) for _ in range(3)]
        await asyncio.sleep(0.001)
        modest = asyncio.create_task(ask(gate, "modest", 0.001))
        return await asyncio.gather(*greedy), await modest, await ask(gate, "greedy", 0)

    greedy, modest, afterwards = asyncio.run(scene())
    assert greedy == [200, 200, 429]  # the last one waited, and gave its place
    assert modest == afterwards == 200


def test_who_gives_up_gives_its_place_back():
    async def scene():
        gate = Gate(1, 4, Metrics())
        tasks = [asyncio.create_task(ask(gate, client, 0.005)) for client in "abc"]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[1].cancel()  # its turn comes in the same moment
        with pytest.raises(TimeoutError):
            async with gate.enter(asyncio.get_running_loop().time(), "late"):
                pass
        await tasks[2]
        return await ask(gate, "d", 0), gate

    status, gate = asyncio.run(scene())
    assert status == 200
    assert (gate._free, gate._waiting, gate._inside) == (1, [], Counter())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ask", "cancel", "wait"])), max_size=30))
def test_never_more_inside_than_places_and_none_is_lost(steps):
    async def scene():
        gate, inside, most = Gate(2, 3, Metrics()), 0, 0

        async def hold(client):
            nonlocal inside, most
            async with gate.enter(asyncio.get_running_loop().time() + LATER, client):
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0.0005)
                finally:
                    inside -= 1

        tasks = []
        for client, action in steps:
            if action == "ask":
                tasks.append(asyncio.create_task(hold(client)))
            elif action == "cancel" and tasks:
                tasks[len(client) * 7 % len(tasks)].cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, gate

    most, gate = asyncio.run(scene())
    assert most <= 2
    assert (gate._free, gate._waiting, gate._inside) == (2, [], Counter())


def test_usage_is_forgotten_by_halves_and_bounded():
    usage, later = RecentUse(), 2 * HALF_LIFE
    usage.add("a", 8.0, now=0.0)
    assert usage.of("a", later) == pytest.approx(2.0)
    usage.add("a", 1.0, later)
    assert usage.of("a", later) == pytest.approx(3.0)
    for n in range(REMEMBERED):
        usage.add(str(n), 1.0, later)
    assert usage.of("a", later) == 0.0
    assert len(usage._had) == REMEMBERED


def test_a_client_is_an_address_and_of_ipv6_a_network():
    assert client_of("192.0.2.7") == "192.0.2.7"
    assert client_of("2001:db8::1") == client_of("2001:db8::2") != client_of("2001:db8:1::1")
    assert client_of("") == ""
