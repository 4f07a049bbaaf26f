"""The service under hostile clients: what one of them does, or an engine that fails, costs nobody else an answer."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from serving_tools import LIMITS, direct, listening, make_engine, metric, wait_until

from common.serving import connections
from common.serving import engine as engine_module
from common.serving.api import Limits
from common.serving.backend import HttpEngine


def complete(url, prompt="hello", max_tokens=20, **changes):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | changes
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def text(answer) -> str:
    return answer.json()["choices"][0]["text"]


def connect(url, sent=b"", room=None) -> socket.socket:
    """A bare connection that has sent `sent`; with `room`, its system takes that many bytes and no more."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if room:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect((host, int(port)))
    connection.sendall(sent)
    return connection


def raw(path="/v1/completions", **body) -> bytes:
    content = json.dumps({"model": "tiny", "prompt": "x", "temperature": 1, "seed": 3} | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def is_cut(connection) -> bool:
    """Whether the service has ended this connection (what it sent before is read away)."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


# --- readers ---


def test_readers_that_stall_hold_no_slot_and_are_cut(make_llama, tokenizer):
    """Their answers are 120 events of 100 kB: more than any system holds for a reader."""
    limits = Limits(slots=2, queue=4, max_prompt=100, max_output=120, max_bytes=200_000, timeout=20, patience=4)
    engine = make_engine(make_llama(eos_token_id=None), tokenizer, limits)
    engine.name = "m" * 100_000
    with listening(engine, limits) as url, ExitStack() as stack:
        request = raw(model=engine.name, stream=True, max_tokens=120)
        stalled = [stack.enter_context(connect(url, request, room=4096)) for _ in range(limits.slots)]
        wait_until(lambda: metric(url, "llm_generated_tokens_total") == 120 * limits.slots, limits.patience - 1)
        assert complete(url, max_tokens=5, model=engine.name).status_code == 200
        assert metric(url, "llm_requests_running") == 0
        assert metric(url, "llm_errors_total") == 0  # nobody has been cut so far
        time.sleep(limits.patience + 1)  # and nobody reads a byte
        assert all(map(is_cut, stalled))


# --- fairness ---


def test_short_requests_starve_nobody(make_llama, tokenizer):
    """Reading a prompt takes ten times as long as a token; four clients send nothing but prompts."""
    engine = make_engine(make_llama(eos_token_id=None), tokenizer, delay=0.005)
    spent = {"join": 0.0, "step": 0.0}

    def timed(name, seconds):
        whole = getattr(engine._batch, name)

        def call(*given):
            start = time.perf_counter()
            time.sleep(seconds)
            whole(*given)
            spent[name] += time.perf_counter() - start

        setattr(engine._batch, name, call)

    def attack(client) -> int:
        sent, body = 0, {"model": "tiny", "prompt": "x", "max_tokens": 1}
        while not done.is_set():
            sent += client.post("/v1/completions", json=body).status_code == 200
        return sent

    timed("join", 0.05)
    timed("step", 0)
    done = threading.Event()
    with listening(engine) as url, httpx.Client(base_url=url) as client, ThreadPoolExecutor(4) as pool:
        attacks = [pool.submit(attack, client) for _ in range(4)]
        time.sleep(0.3)
        spent.update(join=0.0, step=0.0)
        try:
            assert complete(url, "victim", 100).json()["usage"]["completion_tokens"] == 100
            during = dict(spent)
        finally:
            done.set()
        assert sum(attack.result() for attack in attacks) > 5  # they are served, too
    waiting = 10 * 0.06  # until the victim joins, and around its last token
    assert during["join"] < 1.2 * during["step"] + waiting  # at most about twice the time that it takes alone


# --- an engine that fails ---


def health(url) -> tuple[int, int]:
    return httpx.get(f"{url}/health/live").status_code, httpx.get(f"{url}/health/ready").status_code


def failing(*_):
    raise RuntimeError("planted: the device is lost")


@pytest.mark.parametrize("method", ["step", "join", "leave"])
def test_an_engine_that_fails_again_and_again_is_not_ready_until_it_computes(llama, tokenizer, monkeypatch, method):
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.1)
    engine = make_engine(llama, tokenizer)
    with listening(engine) as url:
        assert health(url) == (200, 200)
        whole = getattr(engine._batch, method)
        setattr(engine._batch, method, failing)
        for _ in range(engine_module.FAILURES):
            complete(url)
        wait_until(lambda: health(url) == (200, 503), 5)
        time.sleep(0.3)  # a probe fails as well
        assert health(url) == (200, 503)
        setattr(engine._batch, method, whole)
        wait_until(lambda: health(url) == (200, 200), 5)
        assert text(complete(url)) == direct(llama, tokenizer, "hello", 20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the SystemExit planted here
def test_an_engine_without_its_thread_is_not_live(llama, tokenizer):
    engine = make_engine(llama, tokenizer)

    def end():
        raise SystemExit

    with listening(engine) as url, ThreadPoolExecutor(6) as pool:
        engine._batch.step = end
        start = time.monotonic()
        assert {answer.status_code for answer in pool.map(lambda _: complete(url), range(6))} == {503}
        assert complete(url).status_code == 503  # and whoever comes later
        assert time.monotonic() - start < 5
        assert health(url) == (503, 503)


# --- connections ---


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: loc",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{",
        raw(max_tokens=2) + b"GET /v1/mod",
        raw("/nowhere") + raw()[:-5],
    ],
)
def test_half_sent_and_idle_connections_are_cut(llama, tokenizer, sent):
    limits = Limits(slots=2, queue=4, max_prompt=100, max_output=120, patience=1)
    with listening(make_engine(llama, tokenizer, limits), limits) as url, connect(url, sent) as connection:
        assert not is_cut(connection)
        assert wait_until(lambda: is_cut(connection), 8) > 0.3


def test_bytes_that_drip_are_cut_too(llama, tokenizer):
    limits = Limits(slots=2, queue=4, patience=1)
    with listening(make_engine(llama, tokenizer, limits), limits) as url, connect(url, b"GET / HTTP/1.1\r\n") as slow:
        start = time.monotonic()
        while not is_cut(slow):
            assert time.monotonic() - start < 5
            time.sleep(0.1)
            try:
                slow.send(b"X")
            except OSError:
                break


def test_an_answer_may_take_longer_than_a_client(llama, tokenizer):
    """Patience is for clients: one that waits for its slow answer is not cut."""
    limits = Limits(slots=2, queue=4, max_prompt=100, max_output=120, patience=0.3)
    with listening(make_engine(llama, tokenizer, limits, delay=0.03), limits) as url:
        answer = complete(url, max_tokens=30)
        assert answer.elapsed.total_seconds() > 2 * limits.patience
        assert text(answer) == direct(llama, tokenizer, "hello", 30)


def test_connections_beyond_the_limit_are_refused_and_the_others_served(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 4)
    limits = Limits(slots=2, queue=4, max_prompt=100, max_output=120, patience=1)
    with listening(make_engine(llama, tokenizer, limits), limits) as url, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(url))
        assert httpx.get(f"{url}/v1/models").status_code == 503
        wait_until(lambda: httpx.get(f"{url}/v1/models").status_code == 200, 5)  # who said nothing was cut


@pytest.mark.parametrize(("count", "size"), [(101, 5), (1, 20000), (20, 1000)])
def test_headers_are_limited(llama, tokenizer, count, size):
    with listening(make_engine(llama, tokenizer)) as url:
        headers = b"".join(b"X-%d: %s\r\n" % (n, b"a" * size) for n in range(count))
        with connect(url, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n") as connection:
            assert connection.recv(100).split()[1] in (b"431", b"400")  # uvicorn's own limit answers 400


# --- what is open ---


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_documentation_is_off_unless_asked_for(llama, tokenizer, path):
    for docs, status in ((False, 404), (True, 200)):
        with listening(make_engine(llama, tokenizer), docs=docs) as url:
            assert httpx.get(url + path).status_code == status
        with listening(make_engine(llama, tokenizer), docs=docs, api_key="k") as url:
            assert httpx.get(url + path).status_code == 401


def test_readiness_asks_the_model_server_once_a_second():
    asked = []

    def answer(request):
        asked.append(request.url.path)
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    async def ask():
        engine = HttpEngine("http://127.0.0.1:1", "m")
        engine._client = httpx.AsyncClient(base_url="http://upstream", transport=httpx.MockTransport(answer))
        return await asyncio.gather(*(engine.ready() for _ in range(50)))

    assert asyncio.run(ask()) == [True] * 50
    assert asked == ["/v1/models"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("localhost@evil.example", 400),
        ("evil.example:localhost", 400),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_other_names_than_the_services_own_are_refused(llama, tokenizer, host, status):
    with listening(make_engine(llama, tokenizer)) as url:
        assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == status


def test_names_can_be_given(llama, tokenizer):
    for hosts, status in ((("LLM.example",), 200), (("*",), 200), (("other.example",), 400)):
        with listening(make_engine(llama, tokenizer), hosts=hosts) as url:
            assert httpx.get(f"{url}/v1/models", headers={"Host": "llm.example"}).status_code == status


# --- what tells answers apart ---


def test_tokenizing_does_not_stop_the_event_loop(llama, tokenizer):
    """A slow tokenizer: others are answered meanwhile; and too many characters are refused before it is asked."""
    engine = make_engine(llama, tokenizer)
    tokens = engine._prompts.tokens
    engine._prompts.tokens = lambda body: (time.sleep(0.5), tokens(body))[1]
    with listening(engine) as url, ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(complete, url) for _ in range(4)]
        time.sleep(0.1)
        start = time.monotonic()
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert time.monotonic() - start < 0.3
        assert {answer.result().status_code for answer in slow} == {200}
        engine._prompts.tokens = tokens
        engine._prompts._tokenizer = failing
        refused = complete(url, "x" * (16 * LIMITS.max_prompt + 1))
    assert refused.status_code == 400
    assert "The prompt has 1601 characters; at most 1600" in refused.json()["error"]["message"]
    assert refused.json()["error"]["code"] == "context_length_exceeded"


# --- bodies ---


@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_too_much_can_read_the_refusal(llama, tokenizer, chunked):
    """Bytes still on their way when a connection is closed would reset it, and the client would read no 413."""
    content = b" " * 600_000
    with listening(make_engine(llama, tokenizer)) as url:
        for _ in range(5):
            with connect(url) as client:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                if chunked:
                    client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
                    parts = [b"%x\r\n%s\r\n" % (100_000, content[:100_000])] * 6 + [b"0\r\n\r\n"]
                else:
                    client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content))
                    parts = [content[n : n + 100_000] for n in range(0, len(content), 100_000)]
                for part in parts:
                    client.sendall(part)
                    time.sleep(0.01)
                assert client.recv(100).split()[1] == b"413"


# --- the protocol's corners ---


def test_requests_in_one_go_are_answered_in_order_and_hold_one_place(llama, tokenizer):
    """Three requests written at once on one connection (pipelining): each has its answer, one after the other."""
    prompts = ("a", "hello", "why")
    with listening(make_engine(llama, tokenizer)) as url:
        expected = [text(complete(url, prompt)) for prompt in prompts]
        with connect(url, b"".join(raw(prompt=prompt, max_tokens=20, temperature=0) for prompt in prompts)) as client:
            client.settimeout(20)
            received, most = b"", 0.0
            while received.count(b'"finish_reason"') < len(prompts):
                received += client.recv(65536)
                most = max(most, metric(url, "llm_requests_running"))
    answers = [json.loads(part[part.index(b"{") :]) for part in received.split(b"HTTP/1.1 200 OK")[1:]]
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    assert most <= 1


def test_a_client_of_http_1_0_gets_its_answer_and_the_end_of_the_connection(llama, tokenizer):
    request = raw(prompt="hello", max_tokens=20, temperature=0).replace(b"HTTP/1.1", b"HTTP/1.0")
    with listening(make_engine(llama, tokenizer)) as url:
        expected = text(complete(url))
        with connect(url, request) as client:
            client.settimeout(20)
            received = b"".join(iter(lambda: client.recv(65536), b""))
    assert json.loads(received[received.index(b"{") :])["choices"][0]["text"] == expected
