"""OpenAI's requests, answers and errors: the part of them that this service supports; unknown fields are refused."""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class ApiError(Exception):
    """An error as a client sees it: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(message: str, param: str | None = None, status: int = 400) -> ApiError:
    return ApiError(status, message, "invalid_request_error", param=param)


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair ("\\ud800"): no character, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class StreamOptions(Strict):
    include_usage: bool = False


StopString = Annotated[Text, Field(min_length=1, max_length=64)]


class GenerationRequest(Strict):
    """What both endpoints have in common. temperature 0 is greedy and repeatable; a seed repeats what was drawn.

    Some clients send every field that OpenAI knows: where this service does one thing only, it takes that value alone.
    """

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: Text | None = None

    @model_validator(mode="after")
    def _options_of_streams(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, fail_fast=True)  # else a body of 64 kB earns 40,000 errors
    logprobs: Literal[False] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)  # OpenAI's newer name for max_tokens

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    prompt: Text
    logprobs: None = None
    echo: Literal[False] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens


Request = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, as engines give it. Token counts are totals so far."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None = None  # of the last piece: "stop" (end of text or a stop string) or "length"

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class AnswerShape:
    """Builds the JSON of one answer: whole, or as the chunks of a stream."""

    def __init__(self, body: Request, identifier: str):
        self.chat = isinstance(body, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{identifier}",
            "created": int(time.time()),
            "model": body.model,
        }

    def whole(self, text: str, finish_reason: str, usage: dict) -> dict:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": usage}

    def chunk(self, text: str, finish_reason: str | None, first: bool) -> dict:
        role = {"role": "assistant"} if first else {}
        content = {"delta": {**role, "content": text}} if self.chat else {"text": text}
        return self._chunk([{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}])

    def usage_chunk(self, usage: dict) -> dict:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}
