"""Honest clients at twice the service's capacity, and among them others who leave, stall, send nonsense or half of it.

For five minutes with 200 clients: pytest -m nightly tests/serving/test_load_mix.py
"""

import asyncio
import json
import random
import socket
import time
from collections import Counter

import httpx
import pytest
from serving_tools import metric, wait_until

from common.serving import serve

SLOTS, QUEUE, TOKENS = 8, 16, 20
OPTIONS = {"slots": SLOTS, "queue": QUEUE, "max-prompt": 100, "max-output": 100, "timeout": 20}
PROMPTS = [f"question {n}" for n in range(4)]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
HEAD += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
NONSENSE = [b"\x00" * 200, b"GET\r\n\r\n", HEAD % 9 + b"{"]


def body(prompt, **changes) -> dict:
    return {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0} | changes


async def honest(client, address, expected, counts):
    """One request and its answer, which must be the one that it gets alone."""
    prompt = random.choice(PROMPTS)
    answer = await client.post("/v1/completions", json=body(prompt))
    counts[answer.status_code] += 1
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["text"] == expected[prompt]
    elif answer.status_code == 429:
        await asyncio.sleep(random.uniform(0.2, 0.6))


async def malformed(client, address, expected, counts):
    content = random.choice([b"{", b"[" * 5000, b'{"model": "tiny"}', b"x" * 70000, b'{"model": "tiny", "prompt": 1}'])
    answer = await client.post("/v1/completions", content=content)
    counts["malformed", answer.status_code] += 1
    await asyncio.sleep(random.uniform(0, 1))


async def rude(client, address, expected, counts):
    """Leaves after a few bytes of an answer, reads none of it, or sends what is no request."""
    stream = json.dumps(body("x", stream=True, max_tokens=5 * TOKENS)).encode()
    kind, request = random.choice(("leaves", "stalls", "nonsense")), HEAD % len(stream) + stream
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    connection.bind((address, 0))
    loop, service = asyncio.get_running_loop(), (client.base_url.host, client.base_url.port)
    await loop.sock_connect(connection, service)
    with connection:
        await loop.sock_sendall(connection, random.choice(NONSENSE) if kind == "nonsense" else request)
        if kind == "leaves":
            await loop.sock_recv(connection, 100)
        else:
            await asyncio.sleep(random.uniform(0.1, 3))
    counts[kind] += 1


async def load(url, seconds, expected, roles) -> Counter:
    """Clients in these roles, each from an address of its own, again and again; what came of it, or what they met."""
    counts, end = Counter(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def act(role, address):
        transport = httpx.AsyncHTTPTransport(verify=False, limits=limits, local_address=address)
        async with httpx.AsyncClient(base_url=url, timeout=30, transport=transport) as client:
            while time.monotonic() < end:
                await role(client, address, expected, counts)

    await asyncio.gather(*(act(role, f"127.1.{n // 200}.{1 + n % 200}") for n, role in enumerate(roles)))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clients", "seconds", "rounds"), [(64, 2, 2), pytest.param(200, 30, 10, marks=pytest.mark.nightly)]
)
def test_honest_clients_among_others(folder, clients, seconds, rounds):
    """In turns undisturbed, and with a third of other clients added: a machine that slows down slows both.

    Kept is the service's work, the tokens that it computes, and who gets it: half of the others ask, without a pause,
    for answers five times as long, and get no more slot-seconds than their share by number, which is a seventh. What
    else they cost (connections, refusals, all in one process of Python) is why fewer honest answers than that come;
    first come, first served, it was 0.40 of them.
    """
    crowd, others = [honest] * (clients * 3 // 4), [malformed, rude] * (clients // 8)
    undisturbed, disturbed = Counter(), Counter()
    with serve(folder, *(str(part) for name, value in OPTIONS.items() for part in (f"--{name}", value))) as url:
        expected = {p: httpx.post(f"{url}/v1/completions", json=body(p)).json()["choices"][0]["text"] for p in PROMPTS}
        for turn in range(rounds):
            for counts, roles in ((undisturbed, crowd), (disturbed, crowd + others)):
                tokens = metric(url, "llm_generated_tokens_total")
                counts.update(asyncio.run(load(url, seconds, expected, roles)))
                wait_until(lambda: metric(url, "llm_requests_running") + metric(url, "llm_requests_waiting") == 0, 10)
                counts["tokens"] += metric(url, "llm_generated_tokens_total") - tokens
            memory = metric(url, "process_resident_memory_bytes")
            if turn == 0:
                before = memory  # after one turn of each: buffers and pools have their size
        ratio = disturbed["tokens"] / undisturbed["tokens"]
        print(f"{undisturbed=}\n{disturbed=}\ndisturbed to undisturbed: {ratio:.3f} of the tokens,")
        answers = disturbed[200] / undisturbed[200]
        share = len(crowd) / (len(crowd) + clients // 8)
        print(f"{answers:.3f} of the honest answers; their share by number is {share:.3f}")
        print(f"memory: {before / 1e6:.1f} MB after the first turn, {memory / 1e6:.1f} MB at the end")
        assert httpx.get(f"{url}/health/ready").status_code == 200
    statuses = {key for key in undisturbed | disturbed if isinstance(key, int)}
    assert statuses == {200, 429}, statuses  # the crowd is more than slots and queue
    refusals = {key[1] for key in disturbed if isinstance(key, tuple)}
    assert refusals == {400, 413}
    assert min(disturbed[kind] for kind in ("leaves", "stalls", "nonsense")) > 0
    assert ratio > (0.9 if seconds > 10 else 0.5)  # seconds are too few for more
    assert answers > 0.6 * share
    assert memory - before < 10e6
