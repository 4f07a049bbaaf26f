"""Server-sent events: ours are read anywhere, and a model server's are read as the standard says."""

import asyncio

import httpx
import pytest
from fuzz_serving import check_read_events, check_written_events, read_events
from hypothesis import example, given
from hypothesis import strategies as st
from serving_tools import listening

from common.serving.api import Limits
from common.serving.backend import HttpEngine

CUTS = st.lists(st.integers(0, 200), max_size=4)
LINES = st.lists(
    st.sampled_from(
        [b"data: x", b"data:y", b"data", b": comment", b"event: e", b"", "data: a\u2028b\u0085".encode(), b"\xff"]
        + [b'data: {"choices": [%s]}' % c for c in (b"", b"{}", b"null", b'{"text": 3, "finish_reason": null}')]
        + [b"data: " + d for d in (b"[DONE]", b"[]", b"null", b"[" * 5000, b'{"choices": [], "usage": {}}')]
    )
)


@given(text=st.text(), cuts=CUTS)
@example(text="a\u2028b\x85c\r\n\n", cuts=[])
def test_any_text_comes_back_from_our_events(text, cuts):
    check_written_events(text, cuts)


@given(lines=LINES, ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=1), cuts=CUTS)
def test_a_model_servers_events_are_read_as_the_standard_says(lines, ends, cuts):
    check_read_events(b"".join(line + ends[n % len(ends)] for n, line in enumerate(lines)), cuts)


@given(body=st.binary(), cuts=CUTS)
def test_any_bytes_are_read_or_refused(body, cuts):
    check_read_events(body, cuts)


def test_data_of_several_lines_is_one_event():
    assert read_events(b"data: a\r\ndata: b\r\n\r\ndata:c\n\n", [8, 9]) == ["a\nb", "c"]


TEXT = "a\u2028b\u0085c 結"
EVENTS = 'data: {"choices": [{"text": "%s", "finish_reason": %s}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": %s}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (EVENTS % (TEXT, '"stop"') + USAGE % 1, 200),
        (EVENTS % ("a", "null") + EVENTS % ("b", '"stop"') + USAGE % 1, 200),  # fewer tokens than events
        (EVENTS % ("\\ud800", '"stop"') + USAGE % 1, 502),
        (EVENTS % ("a", '"stop"') + USAGE % '"many"', 502),
        (EVENTS % ("a", '"stop"') + USAGE % "null", 502),
        ("data: []\n\n", 502),
        ('data: {"choices": [null]}\n\n', 502),
        ("data: " + "[" * 100_000 + "\n\n", 502),
        ("", 502),
    ],
)
def test_what_a_model_server_sends_is_an_answer_or_its_failure(body, status):
    """Also what other readers take for the end of a line (U+2028, U+0085) within an answer."""

    def answer(request):
        return httpx.Response(200, content=body.encode())

    engine = HttpEngine("http://127.0.0.1:1", "m")
    engine._client = httpx.AsyncClient(base_url="http://upstream", transport=httpx.MockTransport(answer))
    with listening(engine, Limits()) as url:
        request = {"model": "m", "prompt": "x", "max_tokens": 5}
        got = httpx.post(f"{url}/v1/completions", json=request)
        assert got.status_code == status
        if status == 200:
            streamed = httpx.post(f"{url}/v1/completions", json=request | {"stream": True}).text
            assert got.json()["choices"][0]["text"] in (TEXT, "ab")
            assert "[DONE]" in streamed and "error" not in streamed
        else:
            assert got.json()["error"]["code"] == "backend"


@pytest.mark.parametrize("body", ["", "null", "[]", '{"data": null}', '{"data": [1]}', "[" * 100_000])
def test_a_model_server_that_talks_nonsense_is_not_ready(body):
    async def ask():
        engine = HttpEngine("http://127.0.0.1:1", "m")
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text=body))
        engine._client = httpx.AsyncClient(base_url="http://upstream", transport=transport)
        return await engine.ready()

    assert not asyncio.run(ask())
