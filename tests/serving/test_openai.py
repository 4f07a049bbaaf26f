"""What users of OpenAI's API expect: honoured, or refused by name; and answers that can be found in the log."""

import json
import logging

import httpx
import openai
import pytest
from pydantic import ValidationError
from serving_tools import listening, make_engine, wait_until

from common.serving.logs import JsonFormatter
from common.serving.schemas import ChatRequest


@pytest.fixture
def url(llama, chatty):
    with listening(make_engine(llama, chatty)) as url:
        yield url


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}


def text(answer) -> str:
    return answer.choices[0].message.content


def test_values_that_change_nothing_are_taken(client):
    plain = text(client.chat.completions.create(**CHAT, temperature=0))
    given = {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "stop": None, "user": "u"}
    assert text(client.chat.completions.create(**CHAT, temperature=0, **given)) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("tools", []),
        ("response_format", {"type": "json_object"}),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError, match=field):
        client.chat.completions.create(**CHAT, **{field: value})


def test_a_seed_repeats_what_was_drawn(client):
    draws = [text(client.chat.completions.create(**CHAT, temperature=1, seed=seed)) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]


def test_the_first_of_several_stop_strings_ends_the_answer(client):
    whole = text(client.chat.completions.create(**CHAT, temperature=0))
    late, early = whole[9:11], whole[4:6]
    for stop in ([late, early], [early, late], [early]):
        answer = client.chat.completions.create(**CHAT, temperature=0, stop=stop)
        assert text(answer) == whole[: whole.index(early)]
        assert answer.choices[0].finish_reason == "stop"


def test_embeddings_are_refused_clearly(client):
    with pytest.raises(openai.NotFoundError, match="This service has /v1/chat/completions, /v1/completions"):
        client.embeddings.create(model="tiny", input="x")


def test_an_answer_its_header_and_its_line_in_the_log_have_one_id(url, caplog):
    """And the log holds nothing of what the user wrote or the model said."""
    caplog.set_level(logging.INFO, "common.serving")
    secret = "a secret that nobody may log"
    answers = [
        httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": secret, "max_tokens": 9}),
        httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": secret, "temperature": secret}),
        httpx.get(f"{url}/v1/{secret}"),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3
    assert answers[0].json()["id"] == f"cmpl-{ids[0]}"
    wait_until(lambda: sum(r.getMessage() == "request" for r in caplog.records) == 3, 5)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert not any(secret in line or answers[0].json()["choices"][0]["text"] in line for line in lines)
    logged = {line["request_id"]: line for line in map(json.loads, lines) if line["message"] == "request"}
    assert [logged[i]["status"] for i in ids] == [200, 400, 404]
    used = answers[0].json()["usage"]
    assert used.items() <= logged[ids[0]].items()
    assert logged[ids[0]]["seconds"] > 0


def test_a_failure_is_logged_with_its_traceback():
    try:
        raise MemoryError("planted")
    except MemoryError:
        record = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, "f", 1, "failed", (), __import__("sys").exc_info()
        )
    line = json.loads(JsonFormatter().format(record))
    assert line["level"] == "ERROR"
    assert "MemoryError: planted" in line["exception"]


@pytest.mark.parametrize(
    "part", [{"messages": [{}] * 20_000}, {"messages": [{"role": "user", "content": [{}] * 20_000}]}]
)
def test_one_error_is_enough(part):
    """Twenty thousand would take a quarter of a second of the event loop, and every other client's."""
    with pytest.raises(ValidationError) as refused:
        ChatRequest(model="m", **part)
    assert refused.value.error_count() < 10
